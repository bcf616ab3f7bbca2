"""The YAML form of a space, its presets, and how a ``SearchSpace`` is built from it."""

from __future__ import annotations

from importlib import resources
from itertools import product
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moesaic.search_spaces.architecture import Slot
from moesaic.search_spaces.errors import MoesaicError, nearest_name
from moesaic.search_spaces.parts import TILE, Attention, Backbone, CrossAttention, Router, RouterWeights
from moesaic.search_spaces.space import FeedForwardGroup, LayerSpace, SearchSpace, StackSpace, distinct_routers
from moesaic.search_spaces.yaml_source import YamlSource, parse_yaml, validate

Positive = Annotated[int, Field(ge=1)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RouterSpec(_Spec):
    """A kind of router with the allowed values of its settings: k, or threshold and max_k."""

    kind: Literal["top_k", "threshold"]
    k: list[Positive] | None = None
    threshold: list[float] | None = None
    max_k: list[Positive] | None = None
    weights: RouterWeights = "sum"
    score: Literal["softmax", "mass"] = "softmax"

    def routers(self) -> list[Router]:
        if self.kind == "top_k":
            return [Router("top_k", k=k, weights=self.weights, score=self.score) for k in self.k or []]
        return [
            Router("threshold", threshold=threshold, max_k=max_k, weights=self.weights, score=self.score)
            for threshold, max_k in product(self.threshold or [], self.max_k or [])
        ]

    @model_validator(mode="after")
    def _complete(self) -> RouterSpec:
        wanted, unwanted = (["k"], ["threshold", "max_k"]) if self.kind == "top_k" else (["threshold", "max_k"], ["k"])
        for name in unwanted:
            if getattr(self, name) is not None:
                raise MoesaicError(f"a {self.kind} router has no {name}", allowed=", ".join(wanted))
        for name in wanted:
            if not getattr(self, name):
                raise MoesaicError(f"a {self.kind} router needs values for {name}")
        self.routers()
        return self


class HeadsSpec(_Spec):
    """Numbers of heads. Without ``kv_heads``, each head has keys and values of its own."""

    heads: Annotated[list[Positive], Field(min_length=1)]
    kv_heads: Annotated[list[Positive], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _some_pair(self) -> HeadsSpec:
        if not self.pairs():
            raise MoesaicError("no value of kv_heads divides one of heads", found=f"{self.heads}, {self.kv_heads}")
        return self

    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of numbers of query heads and of key/value heads."""
        return sorted({(h, kv) for h in self.heads for kv in self.kv_heads or [h] if h % kv == 0})


class CrossSpec(HeadsSpec):
    """Choices of cross-attention: heads, and ``span``, how many of the last encoder layers it reads."""

    span: Annotated[list[Positive], Field(min_length=1)] = [1]

    def crosses(self) -> tuple[CrossAttention, ...]:
        return tuple(CrossAttention(h, kv, span) for h, kv in self.pairs() for span in sorted(set(self.span)))


class LayerSpec(HeadsSpec):
    """Choices of a layer. ``dense_sizes`` are the neurons of a one-expert layer, ``expert_sizes`` of each expert, or
    with ``equal_sizes`` of all experts; ``cross`` is for a decoder beside an encoder."""

    cross: CrossSpec | None = None
    experts: list[Positive]
    expert_sizes: list[Positive] = []
    equal_sizes: bool = False
    dense_sizes: list[Positive] = []
    shared_sizes: list[Annotated[int, Field(ge=0)]] = [0]
    routers: list[RouterSpec] = []

    @model_validator(mode="after")
    def _sizes(self) -> LayerSpec:
        for name in ("expert_sizes", "dense_sizes", "shared_sizes"):
            for size in getattr(self, name):
                if size % TILE:
                    nearest = max(TILE, round(size / TILE) * TILE)
                    raise MoesaicError(f"{name} must be multiples of {TILE}", found=size, nearest=nearest)
        for name in ("experts", "shared_sizes"):
            if not getattr(self, name):
                raise MoesaicError(f"{name} needs at least one value")
        if 1 in self.experts and not self.dense_sizes:
            raise MoesaicError("experts: 1 is a dense layer: give dense_sizes")
        if max(self.experts) > 1 and not (self.expert_sizes and self.routers):
            raise MoesaicError("several experts need expert_sizes and routers")
        for experts in self.experts:
            if experts > 1 and not distinct_routers(self._routers(), experts):
                raise MoesaicError(f"no router fits {experts} experts", allowed=f"k <= {experts}")
        return self

    def _routers(self) -> list[Router]:
        return [router for spec in self.routers for router in spec.routers()]

    def build(self) -> LayerSpace:
        groups = []
        for experts in sorted(set(self.experts)):
            sizes = self.dense_sizes if experts == 1 else self.expert_sizes
            shared = [0] if experts == 1 else self.shared_sizes
            routers = distinct_routers(self._routers(), experts)
            equal = self.equal_sizes and experts > 1
            sizes, shared = (tuple(sorted(set(values))) for values in (sizes, shared))
            groups.append(FeedForwardGroup(experts, sizes, shared, routers, equal))
        attentions = tuple(Attention(h, kv) for h, kv in self.pairs())
        return LayerSpace(attentions, tuple(groups), crosses=self.cross.crosses() if self.cross else (None,))


class StackSpec(_Spec):
    """Choices of a stack. ``layers`` overrides keys of ``layer`` at single positions, counted from 0."""

    width: list[Positive]
    depth: list[Positive]
    layer: LayerSpec
    layers: dict[int, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _values(self) -> Self:
        for name in ("width", "depth"):
            if not getattr(self, name):
                raise MoesaicError(f"{name} needs at least one value")
        for width in self.width:
            if width % TILE:
                nearest = max(TILE, round(width / TILE) * TILE)
                raise MoesaicError(f"width must be multiples of {TILE}", found=width, nearest=nearest)
        return self

    def stack(self, source: YamlSource, causal: bool = True) -> StackSpace:
        """``source`` gives the place of an invalid per-layer override."""
        for index in self.layers:
            if not 0 <= index < max(self.depth):
                allowed = f"0 to {max(self.depth) - 1}"
                raise MoesaicError("no such layer", where=source.where(("layers", index)), found=index, allowed=allowed)
        layers = []
        for index in range(max(self.depth)):
            override = self.layers.get(index, {})
            merged = {**self.layer.model_dump(), **override}
            layers.append(validate(LayerSpec, source.at("layers", index, data=merged)).build())
        widths, depths = tuple(sorted(set(self.width))), tuple(sorted(set(self.depth)))
        return StackSpace(widths, depths, tuple(layers), causal)


class SpaceSpec(StackSpec):
    """A whole space: its decoder, and the ``encoder`` of models that translate."""

    name: str = "custom"
    backbone: Backbone = Backbone()
    encoder: StackSpec | None = None

    def build(self, source: YamlSource) -> SearchSpace:
        """The space. ``source`` gives the place of what is wrong.

        Raises
        ------
        MoesaicError : a layer's heads do not fit the backbone; its cross-attention, the encoder.
        """
        decoder = self.stack(source)
        encoder = None
        if self.encoder is not None:
            encoder = self.encoder.stack(source.at("encoder", data=source.data["encoder"]), causal=False)
        space = SearchSpace(self.name, self.backbone, decoder, encoder)
        for slot, layer in space.layers.items():
            where = source.where(("layer",) if slot.stack == "decoder" else (slot.stack, "layer"))
            _check_layer(space, slot, layer, where)
        return space


def _check_layer(space: SearchSpace, slot: Slot, layer: LayerSpace, where: str) -> None:
    reads = slot.stack == "decoder" and space.encoder is not None
    crosses = [cross for cross in layer.crosses if cross]
    if reads != bool(crosses):
        raise MoesaicError(
            f"layer {slot} {'reads no encoder' if reads else 'has no encoder to read'}",
            where=where,
            found=f"{'no' if reads else 'with'} cross",
            allowed="cross: {heads: [...], span: [...]} in the layers of a decoder beside an encoder, and only there",
        )
    if space.encoder is not None and any(cross.span > space.encoder.depths[0] for cross in crosses):
        raise MoesaicError(
            "span exceeds the layers of the shallowest encoder",
            where=where,
            found=max(cross.span for cross in crosses),
            allowed=f"1 to {space.encoder.depths[0]}",
            nearest=space.encoder.depths[0],
        )
    for attention in (*layer.attentions, *crosses):
        try:
            space.backbone.widths(attention)
        except MoesaicError as error:
            raise MoesaicError(error.problem, where=where, found=error.found, allowed=error.allowed) from None


def preset_names() -> list[str]:
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files("moesaic.search_spaces.presets").iterdir()
        if entry.name.endswith(".yaml")
    )


def preset_source(name: str) -> YamlSource:
    """The YAML of a preset. Raises MoesaicError with the existing names."""
    if name not in preset_names():
        raise MoesaicError(
            "no such preset", found=name, allowed=", ".join(preset_names()), nearest=nearest_name(name, preset_names())
        )
    text = resources.files("moesaic.search_spaces.presets").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return parse_yaml(text, f"preset {name}")


def load_space(source: YamlSource) -> SearchSpace:
    """A space from its YAML: the name of a preset, a mapping with ``preset`` and overrides, or a whole space.

    Raises
    ------
    MoesaicError : the YAML is not a valid space; with the place of the first error.
    """
    if isinstance(source.data, str):
        source = source.at(data={"preset": source.data})
    if not isinstance(source.data, dict):
        raise MoesaicError(
            "a space is the name of a preset or a mapping",
            where=source.where(),
            found=source.data,
            allowed=", ".join(preset_names()),
        )
    data = dict(source.data)
    if "preset" in data:
        try:
            base = preset_source(str(data.pop("preset"))).data
        except MoesaicError as error:
            raise MoesaicError(
                error.problem,
                where=source.where(("preset",)),
                found=error.found,
                allowed=error.allowed,
                nearest=error.nearest,
            ) from None
        data = _merged(base, data)
    if isinstance(data.get("backbone"), dict) and "router_weights" in data["backbone"]:
        raise MoesaicError(
            "router_weights is a key of each router now",
            where=source.where(("backbone", "router_weights")),
            nearest=f"layer.routers: [{{kind: ..., weights: {data['backbone']['router_weights']}}}]",
        )
    merged = source.at(data=data)
    return validate(SpaceSpec, merged).build(merged)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``over``: mappings are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
