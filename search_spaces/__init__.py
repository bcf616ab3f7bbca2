"""Say what an architecture is, and which ones exist. Imports the standard library, numpy, pyyaml and pydantic alone."""

from moesaic.search_spaces.architecture import Architecture, Attention, Backbone, FeedForward, Layer, Router, Stack
from moesaic.search_spaces.draw import draw
from moesaic.search_spaces.errors import Interrupted, MoesaicError, StageFailed
from moesaic.search_spaces.moves import crossover, mutate, neighbours
from moesaic.search_spaces.space import SearchSpace
from moesaic.search_spaces.spec import load_space, preset_names, preset_source

__all__ = [
    "Architecture",
    "Attention",
    "Backbone",
    "FeedForward",
    "Interrupted",
    "Layer",
    "MoesaicError",
    "Router",
    "SearchSpace",
    "Stack",
    "StageFailed",
    "crossover",
    "draw",
    "load_space",
    "mutate",
    "neighbours",
    "preset_names",
    "preset_source",
]
