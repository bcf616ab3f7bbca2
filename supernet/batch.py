"""What a step learns from or is judged on, and what a layer gets beside its hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.supernet.cache import LayerCache


@dataclass(frozen=True)
class Batch:
    """Token ids ``tokens`` [B, S], and ``targets`` [B, S] that are to be predicted at their places.

    ``mask`` [B, S] is True at tokens, False at padding, which is neither routed nor counted; None: there is no padding.
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Batch:
        """Some of its sequences."""
        return Batch(self.tokens[rows], self.targets[rows], None if self.mask is None else self.mask[rows])

    def to(self, device: torch.device) -> Batch:
        mask = None if self.mask is None else self.mask.to(device)
        return Batch(self.tokens.to(device), self.targets.to(device), mask)

    def counts(self) -> Tensor:
        """[B] tokens of each sequence, without padding."""
        if self.mask is None:
            return torch.full((len(self.tokens),), self.tokens.shape[1], device=self.tokens.device)
        return self.mask.sum(1)

    def mean(self, losses: Tensor) -> Tensor:
        """Mean of ``losses`` [B, S] over the tokens."""
        return losses.mean() if self.mask is None else (losses * self.mask).sum() / self.mask.sum().clamp(min=1)


@dataclass(frozen=True)
class Inputs:
    """What a layer gets beside its hidden states [B, S, D].

    ``causal``: a token sees none after it. ``mask`` [B, P] is True where a position holds a token, for all P that can
    be seen, of which the last S are those of the hidden states; None: everywhere. ``cache``: what came before them.
    """

    causal: bool = True
    mask: Tensor | None = None
    cache: LayerCache | None = None
