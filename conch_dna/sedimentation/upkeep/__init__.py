"""A store kept in order: what it forgets, whether it is whole, and copies of it."""
