"""A space of models that translate, small enough to enumerate."""

from __future__ import annotations

from moesaic.search_spaces import SearchSpace, load_space
from moesaic.search_spaces.yaml_source import YamlSource


def two_stack_space() -> SearchSpace:
    """A layer is one of 2 pairs of heads and 4 parts, in the decoder with one of 2 spans: 2 x (8 + 64) encoders of at
    most two layers... see ``spans``."""
    layer = {"heads": [1, 2], "kv_heads": [1], "experts": [1, 2], "dense_sizes": [32], "expert_sizes": [16, 32],
             "routers": [{"kind": "top_k", "k": [1]}]}  # fmt: skip
    narrow = layer | {"heads": [1]}
    encoder = {"width": [32, 48], "depth": [1], "layer": layer}
    decoder = {"width": [16, 32], "depth": [1, 2], "layer": narrow | {"cross": {"heads": [1, 2], "kv_heads": [1]}}}
    plain = {"name": "two", "backbone": {"head_size": 16}, "encoder": encoder, **decoder}
    return load_space(YamlSource("two", plain))
