"""Reads and writes the model folders of other programs: one two-way table of names per family."""

from moesaic.supernet.convert.checkpoint import Checkpoint, open_checkpoint, write_folder

__all__ = ["Checkpoint", "open_checkpoint", "write_folder"]
