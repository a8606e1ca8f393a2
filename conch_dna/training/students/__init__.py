"""Students made from a teacher: which of its parts stay."""
