"""Masked tokens: predict some tokens of a text from all others, as BERT is trained (arXiv 1810.04805)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from moesaic.nas.data.tokenizer import read_tokenizer
from moesaic.nas.tasks.language import perplexity
from moesaic.nas.tasks.task import Metric, Split
from moesaic.nas.tasks.text import TextTask, special_id
from moesaic.supernet import Batch

MASKS = ("[MASK]", "<mask>")
_CHOSEN, _MASKED, _RANDOM = 0.15, 0.8, 0.1
"""Shares: of the tokens that are predicted; and of these, of those that read as a mask, or as a random token."""


@dataclass(frozen=True)
class MaskedTokens(TextTask):
    """15 % of a window's tokens are chosen, and only these are scored. Of them 80 % are replaced by [MASK], 10 % by a
    random token, and 10 % stay. Special tokens are neither chosen nor drawn."""

    name = "masked"
    loss = "cross_entropy"
    unit = "nats per masked token"
    imitation = "distillation"
    metrics = (Metric("masked_perplexity", "masked-token perplexity", ".2f"),)

    @property
    def fingerprint(self) -> str:
        return f"{self.corpus.fingerprint}-{self.name}"

    @cached_property
    def mask(self) -> int:
        """The id of [MASK]. Raises MoesaicError where the tokenizer has none."""
        return special_id(read_tokenizer(self.tokenizer), MASKS, str(self.tokenizer))

    def batch(self, size: int, seed: int, step: int) -> Batch:
        """Other tokens of a window are chosen whenever it is drawn again."""
        windows = self.framed(self.corpus.batch("train", size, seed, step))
        return self._masked(windows, (np.random.default_rng([seed, step, row]) for row in range(size)))

    def held_out(self, split: Split, count: int) -> Batch:
        """What is masked in a window depends on its tokens alone."""
        windows = self.framed(self.corpus.windows(split, count))
        digests = (hashlib.sha256(row.numpy().tobytes()).digest() for row in windows)
        return self._masked(windows, (np.random.default_rng(list(digest)) for digest in digests))

    def measure(self, split: Split, loss: float) -> dict[str, float]:
        """exp(loss). It is no perplexity of the text, and there are no bits per byte: 85 % of the tokens are given."""
        return {"masked_perplexity": perplexity(loss)}

    def _masked(self, windows: Tensor, generators: Iterable[np.random.Generator]) -> Batch:
        """[B, S] windows with the choices of each row's generator."""
        tokens, scored = windows.clone(), torch.zeros_like(windows, dtype=torch.bool)
        for row, rng in enumerate(generators):
            usual = np.flatnonzero(~np.isin(windows[row].numpy(), list(self.frame.special)))
            if not len(usual):
                continue
            chosen = rng.permutation(usual)[: max(1, round(_CHOSEN * len(usual)))]
            draws = rng.random(len(chosen))
            masked, random = draws < _MASKED, (draws >= _MASKED) & (draws < _MASKED + _RANDOM)
            tokens[row, chosen[masked]] = self.mask
            tokens[row, chosen[random]] = torch.from_numpy(rng.choice(self._ordinary, int(random.sum())))
            scored[row, chosen] = True
        return Batch(tokens, windows, scored=scored)

    @cached_property
    def _ordinary(self) -> np.ndarray:
        """Ids of the tokenizer's tokens that are not special."""
        ids = read_tokenizer(self.tokenizer).get_vocab(with_added_tokens=True).values()
        return np.array(sorted(set(ids) - self.frame.special), dtype=np.int64)
