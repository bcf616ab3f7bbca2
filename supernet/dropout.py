"""Dropout as a function of seeds: it keeps no state in the model or in torch, so that a step can be repeated."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dropout:
    """Zeroes each value with probability ``rate`` and scales the others by 1 / (1 - rate) (Srivastava et al. 2014), by
    the next draws of ``generator``."""

    rate: float
    generator: torch.Generator

    @staticmethod
    def of(rate: float, device: torch.device, *seeds: int) -> Dropout | None:
        """Draws that ``seeds`` determine; None where nothing is dropped."""
        if not rate:
            return None
        digest = hashlib.sha256("/".join(map(str, seeds)).encode()).digest()
        return Dropout(rate, torch.Generator(device).manual_seed(int.from_bytes(digest[:7])))

    def __call__(self, x: Tensor) -> Tensor:
        kept = torch.empty_like(x).bernoulli_(1 - self.rate, generator=self.generator)
        return x * kept / (1 - self.rate)
