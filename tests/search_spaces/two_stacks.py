"""A family with a second stack, made only from public classes, and a space of it small enough to enumerate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from moesaic.search_spaces import Architecture, Backbone, SearchSpace, Stack, StackSpace, load_space
from moesaic.search_spaces.yaml_source import YamlSource


@dataclass(frozen=True)
class TwoStacks(Architecture):
    encoder: Stack = field(kw_only=True)

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        return {"encoder": self.encoder, "decoder": self.decoder}


@dataclass(frozen=True)
class TwoStackSpace(SearchSpace):
    encoder: StackSpace

    @cached_property
    def stacks(self) -> dict[str, StackSpace]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    def build(self, stacks: Mapping[str, Stack]) -> Architecture:
        return TwoStacks(**stacks, backbone=self.backbone)


def part(name: str, width: list[int], depth: list[int]) -> StackSpace:
    layer = {"heads": [1, 2], "kv_heads": [1], "experts": [1, 2], "dense_sizes": [32], "expert_sizes": [16, 32],
             "routers": [{"kind": "top_k", "k": [1]}]}  # fmt: skip
    return load_space(YamlSource(name, {"width": width, "depth": depth, "layer": layer})).decoder


def two_stack_space() -> TwoStackSpace:
    """A layer is one of 2 pairs of heads and 4 parts: 2 x 8 encoders of one layer, 2 x (8 + 64) decoders."""
    encoder = part("encoder", [32, 48], [1])
    encoder = StackSpace(encoder.widths, encoder.depths, encoder.layers, causal=False)
    return TwoStackSpace("two", Backbone(16), part("decoder", [16, 32], [1, 2]), encoder)
