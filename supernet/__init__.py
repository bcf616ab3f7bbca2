"""Hold every architecture of a space in one set of weights: layers, routing, training, evaluation, extraction."""

from moesaic.supernet.batch import Batch
from moesaic.supernet.cache import KeyValueCache
from moesaic.supernet.evaluate import Evaluation, LayerLoad, evaluate
from moesaic.supernet.generate import beam_search
from moesaic.supernet.judge import Judge
from moesaic.supernet.model import Transformer
from moesaic.supernet.sampling import SliceSampler
from moesaic.supernet.sparsify.repair import repaired
from moesaic.supernet.sparsify.split import split
from moesaic.supernet.train import TrainData, TrainSettings, train
from moesaic.supernet.weights import Weights, scratch, slice_of

__all__ = [
    "Batch",
    "Evaluation",
    "Judge",
    "KeyValueCache",
    "LayerLoad",
    "SliceSampler",
    "TrainData",
    "TrainSettings",
    "Transformer",
    "Weights",
    "beam_search",
    "evaluate",
    "repaired",
    "scratch",
    "slice_of",
    "split",
    "train",
]
