"""What an architecture is: one frozen value that describes a sparse Transformer completely and nothing else.

The sampler makes it, the costs price it, the supernet runs it, the exporter writes it, the report draws it.
Equal architectures are equal values: experts are stored largest first (their order means nothing) and routers
in one spelling, so two ways to write an architecture have one ``fingerprint``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import yaml

from moesaic.search_spaces.errors import MoesaicError
from moesaic.search_spaces.yaml_source import YamlSource, read_yaml, validate

TILE = 16
"""Expert sizes are multiples of this: GPU loads need the alignment."""

_STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class Router:
    """Which experts a token uses.

    ``top_k``: the ``k`` most probable. ``threshold`` (XMoE, arXiv 2403.18926): experts in falling order of
    probability while the mass ranked strictly ahead is below ``threshold``, at least one, at most ``max_k``.
    """

    __pydantic_config__ = _STRICT

    kind: Literal["top_k", "threshold"]
    k: int | None = None
    threshold: float | None = None
    max_k: int | None = None

    def __post_init__(self) -> None:
        if self.kind == "top_k":
            if self.threshold is not None or self.max_k is not None:
                raise ValueError("a top_k router takes k alone, neither threshold nor max_k")
            _at_least(self.k, 1, "k")
        else:
            if self.k is not None:
                raise ValueError("a threshold router takes threshold and max_k, not k")
            _at_least(self.max_k, 1, "max_k")
            if self.threshold is None or not 0 < self.threshold < 1:
                raise MoesaicError("threshold is a probability mass", found=self.threshold, allowed="0 < threshold < 1")

    @property
    def most(self) -> int:
        """The largest number of experts one token may use."""
        most = self.k if self.kind == "top_k" else self.max_k
        assert most is not None
        return most

    def for_experts(self, experts: int) -> Router:
        """The canonical spelling for ``experts`` experts: no more than all, and one expert at most is top-1.

        The j most probable of E experts hold a mass of j / E or more, so a threshold router keeps no more than
        ceil(threshold * E) of them, whatever its max_k.
        """
        most = min(self.most, experts)
        if self.threshold is not None:
            most = min(most, math.ceil(self.threshold * experts - 1e-9))
        if most == self.most and (self.kind == "top_k" or most > 1):
            return self
        if self.kind == "top_k" or most == 1:
            return Router("top_k", k=most)
        return Router("threshold", threshold=self.threshold, max_k=most)

    def __str__(self) -> str:
        return f"top-{self.k}" if self.kind == "top_k" else f"mass {self.threshold:g}, max {self.max_k}"


@dataclass(frozen=True)
class FeedForward:
    """Experts of one layer: neurons per expert, largest first. One expert without a router is a dense layer.

    ``shared_size`` neurons are used by every token beside the routed ones.
    """

    __pydantic_config__ = _STRICT

    expert_sizes: tuple[int, ...]
    router: Router | None = None
    shared_size: int = 0

    def __post_init__(self) -> None:
        if not self.expert_sizes:
            raise ValueError("expert_sizes needs at least one expert")
        for size in self.expert_sizes:
            _tile_multiple(size, "expert size")
        if self.shared_size:
            _tile_multiple(self.shared_size, "shared_size")
        if len(self.expert_sizes) == 1 and (self.router or self.shared_size):
            raise ValueError("a layer of one expert is dense: it has neither router nor shared expert")
        if len(self.expert_sizes) > 1 and self.router is None:
            raise ValueError("a layer of several experts needs a router")
        if self.router and self.router.kind == "top_k" and self.router.most > len(self.expert_sizes):
            raise MoesaicError("k exceeds the experts", found=self.router.k, allowed=f"1 to {len(self.expert_sizes)}")
        if self.router:
            object.__setattr__(self, "router", self.router.for_experts(len(self.expert_sizes)))
        object.__setattr__(self, "expert_sizes", tuple(sorted(self.expert_sizes, reverse=True)))

    @property
    def experts(self) -> int:
        return len(self.expert_sizes)

    @cached_property
    def neurons(self) -> int:
        """All neurons of the layer, shared ones included."""
        return sum(self.expert_sizes) + self.shared_size

    @cached_property
    def worst_active_neurons(self) -> int:
        """Neurons of a token that takes the largest experts its router allows."""
        return sum(self.expert_sizes[: self.router.most if self.router else 1]) + self.shared_size


@dataclass(frozen=True)
class Attention:
    """Causal self-attention with ``heads`` query heads in groups that share ``kv_heads`` key/value heads."""

    __pydantic_config__ = _STRICT

    heads: int
    kv_heads: int

    def __post_init__(self) -> None:
        _at_least(self.heads, 1, "heads")
        _at_least(self.kv_heads, 1, "kv_heads")
        if self.heads % self.kv_heads:
            divisors = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise MoesaicError("kv_heads must divide heads", found=f"{self.kv_heads} of {self.heads}", allowed=divisors)


@dataclass(frozen=True)
class Layer:
    __pydantic_config__ = _STRICT

    attention: Attention
    feed_forward: FeedForward


@dataclass(frozen=True)
class Stack:
    """``layers`` of one ``width``, the size of a token's hidden state between them."""

    __pydantic_config__ = _STRICT

    width: int
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        _tile_multiple(self.width, "width")
        if not self.layers:
            raise ValueError("a stack needs at least one layer")


@dataclass(frozen=True)
class Backbone:
    """What a family fixes rather than searches: pre-RMSNorm, rotary positions, no biases, tied embeddings, and these.

    ``router_weights`` says how the weights of a token's experts scale: ``sum`` divides them by their sum, so the
    output's scale does not depend on the number of experts; ``softmax`` leaves them as they are (XMoE, Switch).
    """

    __pydantic_config__ = _STRICT

    head_size: int = 32
    activation: Literal["relu", "gelu", "swiglu"] = "swiglu"
    router_weights: Literal["sum", "softmax"] = "sum"

    def __post_init__(self) -> None:
        if self.head_size < 2 or self.head_size % 2:
            raise MoesaicError("rotary positions turn pairs", found=self.head_size, allowed="an even head_size >= 2")

    @property
    def matrices(self) -> int:
        """Weight rows per neuron: up and down, and the gate of a gated unit."""
        return 3 if self.activation == "swiglu" else 2


@dataclass(frozen=True)
class Architecture:
    """A Transformer without its vocabulary. A language model is a ``decoder`` alone."""

    __pydantic_config__ = _STRICT

    decoder: Stack
    backbone: Backbone = Backbone()

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, the same for every spelling, process and version of Python."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the keys that say nothing (None, no shared expert)."""
        plain = json.loads(json.dumps(asdict(self)))
        for layer in plain["decoder"]["layers"]:
            feed_forward = layer["feed_forward"]
            if feed_forward["router"] is None:
                del feed_forward["router"]
            else:
                feed_forward["router"] = {k: v for k, v in feed_forward["router"].items() if v is not None}
            if not feed_forward["shared_size"]:
                del feed_forward["shared_size"]
        return plain

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=100)

    @staticmethod
    def from_dict(data: Any, name: str = "architecture") -> Architecture:
        """The inverse of ``to_dict``. Raises MoesaicError that names the key."""
        return validate(Architecture, YamlSource(name, data))

    @staticmethod
    def from_yaml(path: str | os.PathLike[str]) -> Architecture:
        """Read ``architecture.yaml``. Raises MoesaicError that names file, line and key."""
        return validate(Architecture, read_yaml(path))


def _at_least(value: int | None, least: int, name: str) -> None:
    if value is None or value < least:
        raise MoesaicError(f"{name} is needed" if value is None else f"{name} is too small", allowed=f">= {least}")


def _tile_multiple(value: int, name: str) -> None:
    if value < TILE or value % TILE:
        nearest = max(TILE, round(value / TILE) * TILE)
        raise MoesaicError(f"{name} must be a multiple of {TILE}", found=value, nearest=nearest)
