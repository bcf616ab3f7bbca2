"""How much of a sparse layer its tokens use: expected, worst or measured.

A threshold router's compute depends on the data. The expectation comes from the occupancy that was measured on the
trained supernet; before that, from a router that cannot tell experts apart yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from search_spaces import FeedForward, Router
from supernet.evaluate import LayerLoad


@dataclass(frozen=True)
class LayerUse:
    """Per token, ``pairs`` (routed experts) and their ``neurons``; per batch, experts and neurons that are touched."""

    pairs: float
    neurons: float
    live_experts: int
    live_neurons: int


@dataclass(frozen=True)
class Occupancy:
    """Mean experts per token of threshold routers, by number of experts and router."""

    measured: Mapping[tuple[int, Router], float] = field(default_factory=dict)

    def experts_per_token(self, experts: int, router: Router) -> float:
        """Exactly k for top-k. For a threshold router the measured mean; without one, the most it can keep, which
        is what it keeps while it cannot tell experts apart."""
        if router.kind == "top_k":
            return router.most
        known = self.measured.get((experts, router))
        return known if known is not None else router.for_experts(experts).most

    def expected(self, part: FeedForward) -> LayerUse:
        """Tokens spread evenly over the experts, as the load-balance loss makes them."""
        routed = part.neurons - part.shared_size
        if part.router is None:
            return LayerUse(1, routed, 1, routed)
        pairs = self.experts_per_token(part.experts, part.router)
        return LayerUse(pairs, pairs * routed / part.experts, part.experts, routed)

    def to_rows(self) -> list[dict]:
        return [
            {"experts": experts, "threshold": router.threshold, "max_k": router.max_k, "experts_per_token": mean}
            for (experts, router), mean in self.measured.items()
        ]

    @staticmethod
    def from_rows(rows: list[dict]) -> Occupancy:
        return Occupancy(
            {
                (row["experts"], Router("threshold", threshold=row["threshold"], max_k=row["max_k"])): row[
                    "experts_per_token"
                ]
                for row in rows
            }
        )


def worst_use(part: FeedForward) -> LayerUse:
    """Every token takes as many experts as its router allows, and the largest ones."""
    routed = part.neurons - part.shared_size
    pairs = part.router.most if part.router else 1
    return LayerUse(pairs, part.worst_active_neurons - part.shared_size, part.experts, routed)


def measured_use(part: FeedForward, load: LayerLoad) -> LayerUse:
    """What happened on real text."""
    shares = list(zip(load.pairs_per_token, part.expert_sizes, strict=True))
    return LayerUse(
        load.experts_per_token,
        sum(share * size for share, size in shares),
        sum(share > 0 for share, _ in shares),
        sum(size for share, size in shares if share > 0),
    )
