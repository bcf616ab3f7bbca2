"""Define what an architecture is and which ones exist. Imports only the standard library, pyyaml and pydantic."""

from moesaic.search_spaces.architecture import Architecture, Slot, Stack
from moesaic.search_spaces.draw import draw
from moesaic.search_spaces.errors import Damaged, Interrupted, MoesaicError, StageFailed
from moesaic.search_spaces.foreign import read_hat
from moesaic.search_spaces.moves import crossover, mutate, neighbours
from moesaic.search_spaces.parts import Attention, Backbone, CrossAttention, FeedForward, Layer, Router
from moesaic.search_spaces.space import SearchSpace, StackSpace
from moesaic.search_spaces.spec import load_space, preset_names, preset_source
from moesaic.search_spaces.yaml_source import read_yaml

__all__ = [
    "Architecture",
    "Attention",
    "Backbone",
    "CrossAttention",
    "Damaged",
    "FeedForward",
    "Interrupted",
    "Layer",
    "MoesaicError",
    "Router",
    "SearchSpace",
    "Slot",
    "Stack",
    "StackSpace",
    "StageFailed",
    "crossover",
    "draw",
    "load_space",
    "mutate",
    "neighbours",
    "preset_names",
    "preset_source",
    "read_hat",
    "read_yaml",
]
