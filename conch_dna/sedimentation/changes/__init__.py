"""How a store changes: what it learns from, the gate it must pass, the versions it makes."""
