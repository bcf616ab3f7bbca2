"""Batches of sentences of like length, with about as many tokens each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd

import numpy as np

from moesaic.nas.config import ROWS


@dataclass(frozen=True, eq=False)
class Buckets:
    """Batches of sentences of the given ``lengths`` [n], for ``size`` sentences of average length: those of a batch are
    about as long as each other, and a batch of short ones has more of them.

    An epoch has every sentence once; a few of the longest are repeated to fill the last batch. Which sentences of one
    length come together, and the order of the batches, are functions of the seed and the epoch.
    """

    lengths: np.ndarray
    size: int

    @property
    def grain(self) -> int:
        """The number of rows of each batch is a multiple of this, so that several workers can divide them."""
        return gcd(self.size, ROWS)

    @property
    def tokens(self) -> float:
        """The most tokens of a batch, padding included, unless ``grain`` sentences have more."""
        return self.size * float(self.lengths.mean())

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._cuts)

    def rows(self, seed: int, step: int) -> np.ndarray:
        """[B] numbers of the sentences of a step."""
        epoch, place = divmod(step, len(self))
        order, batches = _epoch(self, seed, epoch)
        start, count = self._cuts[batches[place]]
        return np.resize(order[start:], count)

    @cached_property
    def _cuts(self) -> list[tuple[int, int]]:
        """Start and number of rows of each batch, in the sentences from the shortest to the longest."""
        lengths, grain, cuts, start = np.sort(self.lengths), self.grain, [], 0
        while start < len(lengths):
            count = grain
            while (end := start + count + grain) <= len(lengths) and (count + grain) * lengths[end - 1] <= self.tokens:
                count += grain
            cuts.append((max(0, min(start, len(lengths) - count)), count))
            start += count
        return cuts


@lru_cache(maxsize=2)
def _epoch(buckets: Buckets, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Sentences from the shortest to the longest, those of one length in random order; and the order of batches."""
    rng = np.random.default_rng([seed, epoch])
    order = np.lexsort((rng.random(len(buckets.lengths)), buckets.lengths))
    return order, rng.permutation(len(buckets))
