"""How a model comes into memory: the BLAS, GGUF files, full precision on a CPU."""
