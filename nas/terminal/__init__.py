"""What a person sees and does while a command runs: progress, tables, stopping."""
