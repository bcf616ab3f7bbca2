"""How the search judges: the loss of a slice of the trained supernet on held-out text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nas.costs.probe import autocast
from nas.device import Device
from search_spaces import Architecture
from supernet import Evaluation, Transformer, evaluate


@dataclass(frozen=True)
class InheritedLoss:
    """Evaluates with the weights of ``model`` on ``windows`` [n, S + 1]."""

    model: Transformer
    windows: Tensor
    device: Device

    def __call__(self, architecture: Architecture) -> Evaluation:
        with autocast(self.device):
            return evaluate(self.model, self.windows, architecture)
