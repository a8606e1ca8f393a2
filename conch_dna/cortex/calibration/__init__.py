"""How sure a neuron is, measured against EGO on what its training held out."""
