"""Learning from use: experience on disk, and the adapter that is trained on it again."""
