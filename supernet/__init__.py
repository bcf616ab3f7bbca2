"""Hold every architecture of a space in one set of weights: layers, routing, training, evaluation, extraction."""

from supernet.cache import KeyValueCache
from supernet.evaluate import Evaluation, LayerLoad, evaluate
from supernet.model import Transformer
from supernet.sampling import SliceSampler
from supernet.train import TrainData, TrainSettings, train

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
