"""The data of a training or evaluation step, and the inputs of a layer beside its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from moesaic.supernet.cache import LayerPast
from moesaic.supernet.dropout import Dropout
from moesaic.supernet.memory import Memory


class Beside(TypedDict):
    """Arguments of a model beside its tokens."""

    mask: Tensor | None
    source: Tensor | None
    source_mask: Tensor | None


@dataclass(frozen=True)
class Batch:
    """Token ids ``tokens`` [B, S], and ``targets`` [B, S] to predict at the same positions.

    ``mask`` [B, S] is True at tokens and False at padding, which is neither routed nor counted; None: no padding.
    ``scored`` [B, S] is True where the loss counts; None: at every token. ``teacher`` are the logits [B, S, V] of
    another model, or its states [B, S, D], for a loss that imitates them. ``source`` [B, P] are the token ids that an
    encoder reads, ``source_mask`` [B, P] those that are no padding.
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor | None = None
    scored: Tensor | None = None
    teacher: Tensor | None = None
    source: Tensor | None = None
    source_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Batch:
        """The sequences ``rows``."""
        return self._each(lambda tensor: tensor[rows])

    def split(self, length: int) -> list[Batch]:
        """The same sequences in pieces of at most ``length`` positions, without their sources."""
        starts = range(0, self.tokens.shape[1], length)
        alone = replace(self, source=None, source_mask=None)
        return [alone._each(lambda tensor, start=start: tensor[:, start : start + length]) for start in starts]

    @property
    def beside(self) -> Beside:
        """What a model reads beside the tokens."""
        return {"mask": self.mask, "source": self.source, "source_mask": self.source_mask}

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed = {name: change(tensor) for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **changed)

    def counts(self) -> Tensor:
        """[B] tokens of each sequence, without padding."""
        return _counts(self.tokens, self.mask)

    def source_counts(self) -> Tensor:
        """[B] tokens of each source, without padding; 0 where there is none."""
        return self.counts() * 0 if self.source is None else _counts(self.source, self.source_mask)

    def trimmed(self) -> Batch:
        """The same sequences without the positions at the end that are padding in all of them."""
        tokens, source = _ends(self.mask, self.tokens), _ends(self.source_mask, self.source)
        ends = {name: source if name.startswith("source") else tokens for name in vars(self)}
        changed = {name: value[:, : ends[name]] for name, value in vars(self).items() if value is not None}
        return replace(self, **changed)

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
    ``memory``: what cross-attention reads. ``dropout`` is applied to the output of each part.
    """

    causal: bool = True
    mask: Tensor | None = None
    cache: LayerPast | None = None
    memory: Memory | None = None
    dropout: Dropout | None = None

    def dropped(self, x: Tensor) -> Tensor:
        return x if self.dropout is None else self.dropout(x)


def padded(sequences: Sequence[Sequence[int] | np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    """Sequences of ids as one tensor [B, S], with ``fill`` after the shorter ones, and its mask [B, S]."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.full(mask.shape, fill)
    tokens[mask] = torch.from_numpy(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in sequences]))
    return tokens, mask


def _counts(tokens: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    return mask.sum(1)


def _ends(mask: Tensor | None, tokens: Tensor | None) -> int | None:
    """The first position behind all tokens."""
    if mask is None or tokens is None:
        return None
    return int(mask.any(0).nonzero()[-1]) + 1 if bool(mask.any()) else 1
