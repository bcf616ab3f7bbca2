"""How far a ranking of architectures can be trusted: rank correlation, paired tests, corrections, and sentences."""
