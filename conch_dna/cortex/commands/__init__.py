"""What the commands of CORTEX do and show."""
