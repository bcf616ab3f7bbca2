"""Exported models: folders that can be loaded on any machine."""
