"""How the search judges: the loss of a slice of the trained supernet on held-out text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moesaic.nas.costs.latency.probe import autocast
from moesaic.nas.device import Device
from moesaic.search_spaces import Architecture
from moesaic.supernet import Evaluation, Transformer, evaluate


@dataclass(frozen=True)
class InheritedLoss:
    """Evaluates with the weights of ``model`` on ``windows`` [n, S + 1]."""

    model: Transformer
    windows: Tensor
    device: Device

    def __call__(self, architecture: Architecture) -> Evaluation:
        with autocast(self.device):
            return evaluate(self.model, self.windows, architecture)
