"""What a domain's adapter is worth, measured against the student without it and EGO."""
