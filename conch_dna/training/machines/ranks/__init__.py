"""Several processes or machines that compute one run: the first leads it, the others help."""
