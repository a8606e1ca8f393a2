"""CORTEX: one resident student with an adapter per domain."""
