"""Spaces of models that translate: one small enough to enumerate, one with all that HAT and AutoMoE search."""

from __future__ import annotations

from moesaic.search_spaces import SearchSpace, load_space
from moesaic.search_spaces.yaml_source import YamlSource

LAYER = {
    "heads": [2, 4],
    "experts": [1, 2, 4],
    "expert_sizes": [16, 32],
    "dense_sizes": [32, 64],
    "routers": [{"kind": "top_k", "k": [1, 2]}, {"kind": "threshold", "threshold": [0.5], "max_k": [3]}],
}
HAT = {
    "backbone": {"qkv_width": 64, "activation": "relu", "norm": "layer", "norm_place": "post",
                 "positions": "sinusoidal", "biases": "all"},
    "encoder": {"width": [32, 48], "depth": [3, 4], "layer": LAYER},
    "width": [32, 48],
    "depth": [1, 2, 3],
    "layer": LAYER | {"cross": {"heads": [2, 4], "span": [1, 2, 3]}},
}  # fmt: skip


def two_stack_space() -> SearchSpace:
    """A layer has one of 2 pairs of heads (in the decoder, of cross-attention) and one of 4 parts: there are 2 x 8
    encoders of one layer, and 2 x (8 + 64) decoders."""
    layer = {"heads": [1, 2], "kv_heads": [1], "experts": [1, 2], "dense_sizes": [32], "expert_sizes": [16, 32],
             "routers": [{"kind": "top_k", "k": [1]}]}  # fmt: skip
    narrow = layer | {"heads": [1]}
    encoder = {"width": [32, 48], "depth": [1], "layer": layer}
    decoder = {"width": [16, 32], "depth": [1, 2], "layer": narrow | {"cross": {"heads": [1, 2], "kv_heads": [1]}}}
    plain = {"name": "two", "backbone": {"head_size": 16}, "encoder": encoder, **decoder}
    return load_space(YamlSource("two", plain))


def hat_like_space() -> SearchSpace:
    return load_space(YamlSource("hat", HAT))
