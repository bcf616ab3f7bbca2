"""Architectures of other tools: the sub-transformer files of HAT (arXiv 2005.14187) and AutoMoE (arXiv 2210.07535)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from moesaic.search_spaces.architecture import Architecture, Stack
from moesaic.search_spaces.errors import MoesaicError
from moesaic.search_spaces.parts import Attention, Backbone, CrossAttention, FeedForward, Layer, Router
from moesaic.search_spaces.yaml_source import YamlSource, read_yaml, validate

HAT_BACKBONE = Backbone(
    qkv_width=512,
    activation="relu",
    norm="layer",
    norm_place="post",
    norm_eps=1e-5,
    positions="sinusoidal",
    biases="all",
)
"""What HAT and AutoMoE fix: fairseq's Transformer with 512 values of queries, keys and values in every layer."""

Positive = Annotated[int, Field(ge=1)]
Sizes = Annotated[str, Field(pattern=r"^[0-9]+(_[0-9]+)*$")]
"""Neurons of a layer's experts, as AutoMoE writes them: ``3072_1024``."""


def _key(name: str) -> str:
    """How HAT spells a key; AutoMoE's own have no ending."""
    return name.replace("_", "-") + ("" if "expert" in name else "-subtransformer")


class _SubTransformer(BaseModel):
    """The keys of a file. Lists have an entry per layer, or more: those behind the depth are not used."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, alias_generator=_key)

    encoder_embed_dim: Positive
    decoder_embed_dim: Positive
    encoder_layer_num: Positive
    decoder_layer_num: Positive
    encoder_ffn_embed_dim_all: list[Positive]
    decoder_ffn_embed_dim_all: list[Positive]
    encoder_self_attention_heads_all: list[Positive]
    decoder_self_attention_heads_all: list[Positive]
    decoder_ende_attention_heads_all: list[Positive]
    decoder_arbitrary_ende_attn_all: list[Literal[-1, 1, 2]]
    encoder_n_experts: list[Positive] | None = None
    decoder_n_experts: list[Positive] | None = None
    encoder_num_experts_to_route: list[Positive] | None = None
    decoder_num_experts_to_route: list[Positive] | None = None
    encoder_each_expert_ffn_dim_listoflist: list[Sizes] | None = None
    decoder_each_expert_ffn_dim_listoflist: list[Sizes] | None = None


def read_hat(path: str | os.PathLike[str]) -> Architecture:
    """The architecture of a HAT or AutoMoE sub-transformer file.

    An ``arbitrary-ende-attn`` of -1, 1 or 2 is a span of 1, 2 or 3. Several experts have a top-k router (k = 1 unless
    the file says more) whose probabilities scale their outputs; without a size per expert, all have that of the layer.

    Raises
    ------
    MoesaicError : it is no such file, with line and key: a key is missing, unknown or of the wrong kind, a list is
        shorter than the depth, a layer is impossible.
    """
    source = read_yaml(path)
    if not isinstance(source.data, dict):
        raise MoesaicError("is no sub-transformer file of HAT", where=source.where(), allowed="a mapping of keys")
    file = validate(_SubTransformer, source)
    lists = {name: values for name, values in file if isinstance(values, list)}
    for name, values in lists.items():
        depth = getattr(file, f"{name.partition('_')[0]}_layer_num")
        if len(values) < depth:
            raise MoesaicError(
                "a list is shorter than the depth",
                where=source.where((_key(name),)),
                found=f"{len(values)} entries",
                allowed=f"{depth} layers",
            )
    stacks = {}
    for name in ("encoder", "decoder"):
        layers = tuple(_layer(source, file, name, index) for index in range(getattr(file, f"{name}_layer_num")))
        with _at(source, f"{name}_embed_dim"):
            stacks[name] = Stack(getattr(file, f"{name}_embed_dim"), layers, causal=name == "decoder")
    with _at(source, "decoder_arbitrary_ende_attn_all"):
        return Architecture(**stacks, backbone=HAT_BACKBONE)


@contextmanager
def _at(source: YamlSource, *path: str | int) -> Iterator[None]:
    """An error of a value says that it is at the key ``path``."""
    name, *rest = path
    try:
        yield
    except MoesaicError as error:
        raise MoesaicError(
            error.problem,
            where=source.where((_key(str(name)), *rest)),
            found=error.found,
            allowed=error.allowed,
            nearest=error.nearest,
        ) from None


def _layer(source: YamlSource, file: _SubTransformer, stack: str, index: int) -> Layer:
    sizes, router = _experts(source, file, stack, index)
    with _at(source, f"{stack}_{'num_experts_to_route' if router else 'ffn_embed_dim_all'}", index):
        part = FeedForward(sizes, router)
    key = f"{stack}_self_attention_heads_all"
    heads = getattr(file, key)[index]
    attention = Attention(heads, heads)
    with _at(source, key, index):
        HAT_BACKBONE.widths(attention)
    if stack == "encoder":
        return Layer(attention, part)
    heads = file.decoder_ende_attention_heads_all[index]
    cross = CrossAttention(heads, heads, max(file.decoder_arbitrary_ende_attn_all[index], 0) + 1)
    with _at(source, "decoder_ende_attention_heads_all", index):
        HAT_BACKBONE.widths(cross)
    return Layer(attention, part, cross)


def _experts(
    source: YamlSource, file: _SubTransformer, stack: str, index: int
) -> tuple[tuple[int, ...], Router | None]:
    """Sizes of a layer's experts, and its router."""
    counts, ks = getattr(file, f"{stack}_n_experts"), getattr(file, f"{stack}_num_experts_to_route")
    experts = counts[index] if counts else 1
    router = Router("top_k", k=ks[index] if ks else 1, weights="softmax") if experts > 1 else None
    name = f"{stack}_each_expert_ffn_dim_listoflist"
    listed = getattr(file, name)
    if listed is None:
        return (getattr(file, f"{stack}_ffn_embed_dim_all")[index],) * experts, router
    sizes = tuple(int(size) for size in listed[index].split("_"))
    if len(sizes) != experts:
        raise MoesaicError(
            f"layer {stack}.{index} has another number of experts",
            where=source.where((_key(name), index)),
            found=f"{len(sizes)} sizes",
            allowed=f"{experts}, as {_key(f'{stack}_n_experts')} says",
        )
    return sizes, router
