"""What servers and clients here share: who may ask, how much, and how refusals are told."""
