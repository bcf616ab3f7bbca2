"""What an architecture is: one frozen value that describes a sparse Transformer completely and nothing else.

The sampler makes it, the costs price it, the supernet runs it, the exporter writes it, the report draws it. Equal
architectures are equal values with the same ``fingerprint``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Annotated, Any

import yaml
from pydantic import PlainSerializer, PlainValidator

from moesaic.search_spaces.errors import MoesaicError
from moesaic.search_spaces.parts import STRICT, Backbone, Layer, Router, tile_multiple
from moesaic.search_spaces.yaml_source import YamlSource, read_yaml, validate

FORMAT = 2
"""Version of written architectures. Raised when a key moves or changes its meaning, which changes all fingerprints."""
_WRITTEN = {"head_size", "activation"}
"""Keys of a backbone that are written even with their default values."""


@dataclass(frozen=True, order=True, slots=True)
class Slot:
    """The address of a layer: the name of its stack, and its position there from 0."""

    stack: str
    index: int

    def __str__(self) -> str:
        return f"{self.stack}.{self.index}"


def layer_names(slots: Iterable[Slot]) -> dict[Slot, str]:
    """How tables and pictures call the layers at ``slots``: by position alone, where they are of one stack."""
    slots = list(slots)
    several = len({slot.stack for slot in slots}) > 1
    return {slot: str(slot if several else slot.index) for slot in slots}


@dataclass(frozen=True)
class Stack:
    """``layers`` of one ``width``, the size of a token's hidden state.

    In a ``causal`` stack a token sees itself and earlier ones, otherwise all.
    """

    __pydantic_config__ = STRICT

    width: int
    layers: tuple[Layer, ...]
    causal: bool = True

    def __post_init__(self) -> None:
        tile_multiple(self.width, "width")
        if not self.layers:
            raise ValueError("a stack needs at least one layer")


@dataclass(frozen=True)
class Architecture:
    """A Transformer without its vocabulary. A language model has only a ``decoder``; one that translates has an
    ``encoder`` too, whose states every layer of the decoder attends to."""

    __pydantic_config__ = STRICT

    decoder: Stack
    backbone: Backbone = field(default_factory=Backbone)
    encoder: Stack | None = None

    def __post_init__(self) -> None:
        for slot, layer in self.layers.items():
            if self.backbone.qkv_width is not None:
                self.backbone.widths(layer.attention)
            reads = slot.stack == "decoder" and self.encoder is not None
            if reads != (layer.cross is not None):
                raise MoesaicError(
                    f"layer {slot} {'needs' if reads else 'has nothing to read by'} cross-attention",
                    found=layer.cross,
                    allowed="cross-attention in each layer of a decoder that has an encoder, and nowhere else",
                )
            if layer.cross is not None and self.encoder is not None:
                if self.backbone.qkv_width is not None:
                    self.backbone.widths(layer.cross)
                if layer.cross.span > len(self.encoder.layers):
                    raise MoesaicError(
                        f"layer {slot} reads more encoder layers than there are",
                        found=f"span {layer.cross.span}",
                        allowed=f"1 to {len(self.encoder.layers)}",
                    )

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        """By name, in the order of computation; the states of the last one become logits."""
        return {"decoder": self.decoder} if self.encoder is None else {"encoder": self.encoder, "decoder": self.decoder}

    @cached_property
    def layers(self) -> dict[Slot, Layer]:
        """Every layer by its address, stack by stack."""
        return {
            Slot(name, index): layer for name, stack in self.stacks.items() for index, layer in enumerate(stack.layers)
        }

    @property
    def output(self) -> Stack:
        """The stack whose states become logits."""
        return next(reversed(self.stacks.values()))

    @cached_property
    def spans(self) -> tuple[int, ...]:
        """How many of the encoder's last layers each layer of ``output`` reads; empty without an encoder."""
        return tuple(layer.cross.span for layer in self.output.layers if layer.cross)

    @property
    def memory_width(self) -> int:
        """Width of the states that cross-attention reads; 0 without an encoder."""
        return self.encoder.width if self.encoder else 0

    def width_at(self, slot: Slot) -> int:
        return self.stacks[slot.stack].width

    def with_layers(self, changed: Mapping[Slot, Layer]) -> Architecture:
        """A copy with the layers of ``changed`` at their addresses."""
        layers: dict[str, list[Layer]] = {}
        for slot, layer in changed.items():
            stack = self.stacks.get(slot.stack)
            if stack and slot.index < len(stack.layers):
                layers.setdefault(slot.stack, list(stack.layers))[slot.index] = layer
        stacks = {name: replace(self.stacks[name], layers=tuple(found)) for name, found in layers.items()}
        return replace(self, **stacks)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that do not depend on spelling, process or version of Python."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``format``, and all that differs from its default."""
        backbone = {
            key.name: getattr(self.backbone, key.name)
            for key in fields(Backbone)
            if (key.name in _WRITTEN and not (key.name == "head_size" and self.backbone.qkv_width))
            or getattr(self.backbone, key.name) != key.default
        }
        stacks = {name: _plain_stack(stack) for name, stack in self.stacks.items()}
        return {"format": FORMAT, **stacks, "backbone": backbone}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=100)

    @staticmethod
    def from_dict(data: Any, name: str = "architecture") -> Architecture:
        """The inverse of ``to_dict``. Raises MoesaicError with the key."""
        return _read(YamlSource(name, data))

    @staticmethod
    def from_yaml(path: str | os.PathLike[str]) -> Architecture:
        """Read ``architecture.yaml``. Raises MoesaicError with file, line and key."""
        return _read(read_yaml(path))


ArchitectureField = Annotated[
    Architecture, PlainValidator(lambda v: v if isinstance(v, Architecture) else Architecture.from_dict(v)),
    PlainSerializer(Architecture.to_dict),
]  # fmt: skip
"""An architecture as a field of a value that pydantic reads and writes."""


def _plain_stack(stack: Stack) -> dict[str, Any]:
    layers = []
    for layer in stack.layers:
        part = layer.feed_forward
        feed_forward: dict[str, Any] = {"expert_sizes": list(part.expert_sizes)}
        if part.router is not None:
            plain = {key: value for key, value in asdict(part.router).items() if value is not None}
            for key, default in (("weights", Router.weights), ("score", Router.score)):
                if plain[key] == default:
                    del plain[key]
            feed_forward["router"] = plain
        if part.shared_size:
            feed_forward["shared_size"] = part.shared_size
        cross = {} if layer.cross is None else {"cross": asdict(layer.cross)}
        layers.append({"attention": asdict(layer.attention), **cross, "feed_forward": feed_forward})
    return {"width": stack.width, "layers": layers} | ({} if stack.causal else {"causal": False})


def _read(source: YamlSource) -> Architecture:
    data = source.data
    if isinstance(data, dict):
        if data.get("format") != FORMAT:
            raise MoesaicError(
                "an architecture in another format: files of earlier versions cannot be read",
                where=source.where(("format",)),
                found=data.get("format", "no format (version 0.1)"),
                allowed=f"format: {FORMAT}",
            )
        source = source.at(data={key: value for key, value in data.items() if key != "format"})
    return validate(Architecture, source)
