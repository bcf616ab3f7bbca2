"""Exported models: folders that open again, here and elsewhere."""
