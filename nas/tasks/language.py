"""Language modelling: predict each token of a text from those before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moesaic.nas.data import Corpus, open_corpus
from moesaic.nas.tasks.task import Metric, Split
from moesaic.search_spaces import MoesaicError
from moesaic.supernet import Batch


@dataclass(frozen=True)
class LanguageModelling:
    corpus: Corpus

    loss = "cross_entropy"
    metrics = (
        Metric("perplexity", "perplexity", ".2f"),
        Metric("bits_per_byte", "bits per byte", ".3f"),
    )

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    @property
    def vocab_size(self) -> int:
        return self.corpus.vocab_size

    @property
    def sequence_length(self) -> int:
        return self.corpus.sequence_length

    @property
    def tokenizer(self) -> Path:
        path = self.corpus.tokenizer_path
        if not path.is_file():
            problem = "is gone: the cache was cleared while it was in use"
            raise MoesaicError(problem, where=str(path), allowed="the same command again, which rebuilds it")
        return path

    def batch(self, size: int, seed: int, step: int) -> Batch:
        return next_tokens(self.corpus.batch("train", size, seed, step))

    def held_out(self, split: Split, count: int) -> Batch:
        return next_tokens(self.corpus.windows(split, count))

    def measure(self, split: Split, loss: float) -> dict[str, float]:
        """exp(loss), infinite where that overflows; and bits per byte, which is comparable across tokenizers."""
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"perplexity": perplexity, "bits_per_byte": self.corpus.bits_per_byte(split, loss)}

    def plain(self) -> dict[str, Any]:
        folder = str(self.corpus.tokenizer_path.parent.absolute())
        length, size = self.sequence_length, self.vocab_size
        return {"task": "language", "corpus": folder, "sequence_length": length, "vocab_size": size}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> LanguageModelling:
        folder, size = Path(plain["corpus"]), plain["vocab_size"]
        return cls(open_corpus(folder, plain["sequence_length"], str(folder), size))


def next_tokens(windows: Tensor) -> Batch:
    """Windows [B, S + 1] as a batch: S tokens, and the one after each."""
    return Batch(windows[:, :-1], windows[:, 1:])
