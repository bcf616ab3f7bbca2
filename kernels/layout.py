"""Values that a sparse layer is called with: where experts lie in a bank, and which token goes to which expert."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Neuron n of a feed-forward layer is row n of each matrix. ``gate`` is there for gated units.

    ``up``, ``gate``, ``down`` are [N, D_max]; a layer of width D <= D_max uses the first D columns in place.
    """

    up: Tensor
    gate: Tensor | None
    down: Tensor


@dataclass(frozen=True)
class Routing:
    """P (token, expert) pairs sorted by expert, and by token within an expert. A token has any number of them.

    ``tokens`` [P] int64, ``offsets`` [E + 1] int64 (pairs of expert e: ``offsets[e] : offsets[e + 1]``),
    ``weights`` [P] float32, differentiable, ``probabilities`` [T, E] float32, the router's softmax.
    """

    tokens: Tensor
    offsets: Tensor
    weights: Tensor
    probabilities: Tensor

    @property
    def load(self) -> Tensor:
        """[E] pairs per expert."""
        return self.offsets.diff()

    @property
    def experts_per_token(self) -> float:
        return len(self.tokens) / max(1, len(self.probabilities))

    def balance_loss(self) -> Tensor:
        """E * sum_e (share of pairs at e) * (mean probability of e): 1 when balanced.

        Switch Transformers (arXiv 2101.03961) equation 4, with the share of all pairs in place of the share of
        tokens, so that it means the same for any number of experts per token.
        """
        share = self.load / max(1, len(self.tokens))
        return len(share) * (share * self.probabilities.mean(0)).sum()
