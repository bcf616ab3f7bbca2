"""The terminal while a command runs: progress, tables, stopping."""
