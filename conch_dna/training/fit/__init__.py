"""Will a run fit: memory and time told from the models' configurations alone."""
