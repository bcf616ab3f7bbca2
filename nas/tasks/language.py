"""Language modelling: predict each token of a text from those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from moesaic.nas.tasks.task import Metric, Split
from moesaic.nas.tasks.text import TextTask
from moesaic.supernet import Batch


@dataclass(frozen=True)
class LanguageModelling(TextTask):
    name = "language"
    loss = "cross_entropy"
    unit = "nats per token"
    imitation = "distillation"
    metrics = (
        Metric("perplexity", "perplexity", ".2f"),
        Metric("bits_per_byte", "bits per byte", ".3f"),
    )

    def batch(self, size: int, seed: int, step: int) -> Batch:
        return next_tokens(self.corpus.batch("train", size, seed, step))

    def held_out(self, split: Split, count: int) -> Batch:
        return next_tokens(self.corpus.windows(split, count))

    def measure(self, split: Split, loss: float) -> dict[str, float]:
        """exp(loss), and bits per byte, which is comparable across tokenizers."""
        return {"perplexity": perplexity(loss), "bits_per_byte": self.corpus.bits_per_byte(split, loss)}


def next_tokens(windows: Tensor) -> Batch:
    """Windows [B, S + 1] as a batch: S tokens, and the one after each."""
    return Batch(windows[:, :-1], windows[:, 1:])


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
