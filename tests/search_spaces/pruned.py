"""A space of a trained model in which heads, attentions, feed-forward parts and whole layers may be left out."""

from __future__ import annotations

from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, Router, SearchSpace
from moesaic.search_spaces.architecture import Stack
from moesaic.search_spaces.trained import TrainedSpec


def pruned_space(backbone: Backbone | None = None) -> SearchSpace:
    """Of three layers: dense, a mixture, and one without attention; width 32."""
    layers = (
        Layer(Attention(4, 2), FeedForward((96,))),
        Layer(Attention(4, 4), FeedForward((32,) * 4, Router("top_k", k=2), 16)),
        Layer(Attention(0, 0), FeedForward((96,))),
    )
    spec = TrainedSpec(
        expert_sizes=[16, 32], shared=[0.25], active=[0.25, 0.5], threshold=[0.5], kept=[0.25, 0.5, 0.75],
        expert_kept=[0.5, 1.0], prune=["heads", "layers"],
    )  # fmt: skip
    return spec.build(Architecture(Stack(32, layers), backbone or Backbone(head_size=16)))
