"""Sources of weights: functions from an architecture to a model of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from moesaic.search_spaces import Architecture
from moesaic.supernet.model import Transformer
from moesaic.supernet.sharing import Sharing

Weights = Callable[[Architecture], Transformer]


def torch_seed(seed: int) -> int:
    """A seed that torch takes, for one of any size: torch's own have 64 bits."""
    if 0 <= seed < 2**63:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:7])


def scratch(vocab_size: int, seed: int, sharing: Sharing = "nested", source_vocab_size: int | None = None) -> Weights:
    """Random weights, determined by ``seed``."""

    def build(architecture: Architecture) -> Transformer:
        torch.manual_seed(torch_seed(seed))
        return Transformer(architecture, vocab_size, sharing, source_vocab_size)

    return build


def slice_of(model: Transformer) -> Weights:
    """Copies of the weights of ``model``'s slice."""
    return model.extract
