"""A far teacher: a model behind a server, which scores texts and answers prompts for a student."""
