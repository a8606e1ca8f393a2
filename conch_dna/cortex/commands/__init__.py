"""Options, tables and the chat of the commands of CORTEX."""
