"""Reproducing states: how near a model without a head comes to the final states of the model that it is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moesaic.nas.tasks.task import Metric, Split
from moesaic.nas.tasks.text import TextTask, corpus_of
from moesaic.supernet import Batch, Transformer
from moesaic.supernet.convert import Checkpoint, open_checkpoint

_ROWS = 8
"""Sequences that pass through the source at once."""


@dataclass(frozen=True)
class SameStates(TextTask):
    """A model without a head, such as a sentence encoder, predicts nothing of a text. What others use of it are its
    final states, so its quality is their cosine with those of ``source``, a mean over all tokens; the loss is
    1 - cosine. Every batch has the source's states as its teacher."""

    source: Checkpoint

    name = "states"
    loss = "cosine_distance"
    unit = "1 - cosine to the source's states"
    imitation = None
    metrics = (Metric("cosine", "cosine to the source", ".4f", higher_is_better=True),)

    @property
    def fingerprint(self) -> str:
        return f"{self.corpus.fingerprint}-{self.name}-{self.source.fingerprint}"

    def batch(self, size: int, seed: int, step: int) -> Batch:
        return self._taught(self.framed(self.corpus.batch("train", size, seed, step)))

    def held_out(self, split: Split, count: int) -> Batch:
        return self._taught(self.framed(self.corpus.windows(split, count)))

    def measure(self, split: Split, loss: float) -> dict[str, float]:
        return {"cosine": 1 - loss}

    def plain(self) -> dict[str, Any]:
        return {**super().plain(), "source": str(self.source.folder.absolute())}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> SameStates:
        return cls(corpus_of(plain), open_checkpoint(plain["source"]))

    @cached_property
    def _model(self) -> Transformer:
        return self.source.load()

    def _taught(self, windows: Tensor) -> Batch:
        """[B, S] token ids, which nobody predicts, and the source's states [B, S, D]."""
        with torch.no_grad():
            states = torch.cat([self._model(part) for part in windows.split(_ROWS)])
        return Batch(windows, windows, teacher=states)
