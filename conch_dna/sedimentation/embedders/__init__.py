"""What turns texts into unit vectors: models in this process, a server, a teacher's cache."""
