"""What a decoder reads of an encoder: the states after its last layers, and where they are padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """What a decoder reads of an encoder: ``states`` [M, P, D] after each of its last layers, the last one at the end,
    and the ``mask`` [M, P] of their tokens; None: no padding."""

    states: tuple[Tensor, ...]
    mask: Tensor | None = None

    @property
    def width(self) -> int:
        return self.states[-1].shape[-1]

    def last(self, span: int) -> Tensor:
        """[M, span * P, D]: the states after the last ``span`` layers, one after the other."""
        return self.states[-1] if span == 1 else torch.cat(self.states[-span:], dim=1)

    def seen(self, span: int) -> Tensor | None:
        """[M, 1, 1, span * P]: which of ``last`` are those of tokens."""
        return None if self.mask is None else self.mask.repeat(1, span)[:, None, None]

    def rows(self, chosen: Tensor) -> Memory:
        """The memory of the sequences ``chosen`` [m]."""
        mask = None if self.mask is None else self.mask[chosen]
        return Memory(tuple(states[chosen] for states in self.states), mask)
