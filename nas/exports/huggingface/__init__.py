"""Exported models in the library transformers: its Auto classes load an export, once moesaic is imported."""
