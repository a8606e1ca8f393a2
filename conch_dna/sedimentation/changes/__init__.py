"""How a store changes: what it learns from, its gate, and the versions it makes."""
