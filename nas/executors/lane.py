"""A lane of a cluster: a process that evaluates slices of one supernet."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from moesaic.nas import __version__
from moesaic.nas.config import DeviceConfig
from moesaic.nas.device import choose_device
from moesaic.nas.executors.executor import Outcome
from moesaic.nas.executors.local import attempt
from moesaic.search_spaces import Architecture
from moesaic.supernet import Judge


class Lane:
    """Its weights are views of the object store's memory, which all lanes of a node share."""

    def __init__(self, number: int, facts: dict[str, Any], device: DeviceConfig, arrays: dict[str, np.ndarray]):
        self.number, where = number, choose_device(device).torch_device
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
            self.judge = Judge.of(facts, arrays, where)

    def version(self) -> str:
        return __version__

    def evaluate(self, architecture: Architecture) -> Outcome:
        return attempt(self.judge, architecture, self.number)
