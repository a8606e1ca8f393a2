"""The optimiser: one step of it, and the moving average of what it moves."""
