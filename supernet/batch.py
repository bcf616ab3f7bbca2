"""The data of a training or evaluation step, and the inputs of a layer beside its hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moesaic.supernet.cache import LayerCache


@dataclass(frozen=True)
class Batch:
    """Token ids ``tokens`` [B, S], and ``targets`` [B, S] to predict at the same positions.

    ``mask`` [B, S] is True at tokens and False at padding, which is neither routed nor counted; None: no padding.
    ``scored`` [B, S] is True where the loss counts; None: at every token. ``teacher`` are the logits [B, S, V] of
    another model, or its states [B, S, D], for a loss that imitates them.
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor | None = None
    scored: Tensor | None = None
    teacher: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Batch:
        """The sequences ``rows``."""
        return self._each(lambda tensor: tensor[rows])

    def split(self, length: int) -> list[Batch]:
        """The same sequences in pieces of at most ``length`` positions."""
        starts = range(0, self.tokens.shape[1], length)
        return [self._each(lambda tensor, start=start: tensor[:, start : start + length]) for start in starts]

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed = {name: change(tensor) for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **changed)

    def counts(self) -> Tensor:
        """[B] tokens of each sequence, without padding."""
        if self.mask is None:
            return torch.full((len(self.tokens),), self.tokens.shape[1], device=self.tokens.device)
        return self.mask.sum(1)

    def scored_counts(self) -> Tensor:
        """[B] positions of each sequence at which the loss counts."""
        return self.counts() if self.scored is None else self.scored.sum(1)

    def mean(self, losses: Tensor) -> Tensor:
        """Mean of ``losses`` [B, S] where they count."""
        scored = self._scored
        return losses.mean() if scored is None else (losses * scored).sum() / scored.sum().clamp(min=1)

    def means(self, losses: Tensor) -> Tensor:
        """[B] means of ``losses`` [B, S] where they count; 0 where none does."""
        scored = self._scored
        return losses.mean(1) if scored is None else (losses * scored).sum(1) / scored.sum(1).clamp(min=1)

    @property
    def _scored(self) -> Tensor | None:
        return self.mask if self.scored is None else self.scored


@dataclass(frozen=True)
class Inputs:
    """Inputs of a layer beside its hidden states [B, S, D].

    ``causal``: a token does not see later ones. ``mask`` [B, P] is True at tokens, over all P visible positions, of
    which the last S are those of the hidden states; None: no padding. ``cache``: keys and values of earlier positions.
    """

    causal: bool = True
    mask: Tensor | None = None
    cache: LayerCache | None = None
