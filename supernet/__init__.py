"""Hold every architecture of a space in one set of weights: layers, routing, training, evaluation, extraction."""

from moesaic.supernet.cache import KeyValueCache
from moesaic.supernet.evaluate import Evaluation, LayerLoad, evaluate
from moesaic.supernet.model import Transformer
from moesaic.supernet.sampling import SliceSampler
from moesaic.supernet.train import TrainData, TrainSettings, train

__all__ = [
    "Evaluation",
    "KeyValueCache",
    "LayerLoad",
    "SliceSampler",
    "TrainData",
    "TrainSettings",
    "Transformer",
    "evaluate",
    "train",
]
