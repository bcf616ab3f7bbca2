"""Costs of an architecture: closed forms, loads, latency; and whether a measured model keeps its budget."""
