"""Moesaic designs sparse Transformers under a compute budget."""
