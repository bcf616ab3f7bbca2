"""Arguments of a sparse layer: where experts lie in a bank, and which token goes to which expert."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertLayout:
    """Expert e is the rows ``starts[e] : starts[e] + sizes[e]`` of a neuron bank. Experts share no row."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.sizes):
            raise ValueError(f"{len(self.starts)} starts but {len(self.sizes)} sizes")

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(start, size) of each expert."""
        return tuple(zip(self.starts, self.sizes, strict=True))


@dataclass(frozen=True)
class Bank:
    """Neuron n of a feed-forward layer is row n of each matrix. A gated unit has a ``gate``; ``up_bias`` is optional.

    ``up``, ``gate``, ``down`` are [N, D_max]; a layer of width D <= D_max uses the first D columns in place.
    ``up_bias`` [N] is added to the pre-activation of ``up``. A bias of ``down`` is one vector per layer, which the
    caller adds to the output; a gate has none.
    """

    up: Tensor
    gate: Tensor | None
    down: Tensor
    up_bias: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """P (token, expert) pairs sorted by expert, and by token within an expert. A token has any number of them.

    ``tokens`` [P] int64, ``offsets`` [E + 1] int64 (pairs of expert e: ``offsets[e] : offsets[e + 1]``),
    ``weights`` [P] float32, differentiable, ``probabilities`` [T, E] float32, the router's softmax. The lists may
    be longer than P = ``offsets[-1]``, since only the device knows how many pairs a threshold kept; entries past P
    are undefined. ``slots`` [P] is each pair's position when pairs are sorted by token, and by expert within a token;
    those of token t are at ``token_offsets[t] : token_offsets[t + 1]`` [T + 1]. The Triton kernels need both.
    """

    tokens: Tensor
    offsets: Tensor
    weights: Tensor
    probabilities: Tensor
    slots: Tensor | None = None
    token_offsets: Tensor | None = None

    @property
    def load(self) -> Tensor:
        """[E] pairs per expert."""
        return self.offsets.diff()

    def trimmed(self) -> Routing:
        """The same with lists of length P. Synchronises with the device."""
        pairs = int(self.offsets[-1])
        slots = None if self.slots is None else self.slots[:pairs]
        return replace(self, tokens=self.tokens[:pairs], weights=self.weights[:pairs], slots=slots)

    def in_token_order(self) -> Routing:
        """The same with ``slots`` and ``token_offsets``. If they are missing, the lists must have length P."""
        if self.slots is not None:
            return self
        tokens, pairs = self.tokens, torch.arange(len(self.tokens), device=self.tokens.device)
        slots = torch.empty_like(pairs)
        slots[tokens.argsort(stable=True)] = pairs
        count = torch.bincount(tokens, minlength=len(self.probabilities))
        token_offsets = torch.cat((count.new_zeros(1), count.cumsum(0)))
        return replace(self, slots=slots.int(), token_offsets=token_offsets.int())

    def balance_loss(self) -> Tensor:
        """E * sum_e (share of pairs at e) * (mean probability of e): 1 when balanced.

        Switch Transformers (arXiv 2101.03961) equation 4, with the share of all pairs instead of the share of
        tokens, so that values are comparable for any number of experts per token.
        """
        share = self.load / self.offsets[-1].clamp(min=1)
        return len(share) * (share * self.probabilities.mean(0)).sum()
