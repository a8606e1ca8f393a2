"""The map that raw vectors go through: its forms, its training and its export."""
