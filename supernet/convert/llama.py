"""Llama and families of its layout: Mistral, Qwen2, Qwen3, and the mixtures Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, Router
from moesaic.search_spaces.architecture import Stack
from moesaic.supernet.convert.family import Family, Settings
from moesaic.supernet.convert.names import Names, Piece

_ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}
_BASE = 10_000.0


@dataclass(frozen=True)
class _Mixture:
    """How a family calls the parts of a mixture. ``normalised`` is the key that says whether the weights of a token's
    experts are divided by their sum; None: they always are."""

    experts: str
    size: str
    block: str = "mlp"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    k: int = 8
    normalised: str | None = "norm_topk_prob"
    shared: bool = False
    dense_layers: bool = False


@dataclass(frozen=True)
class _Variant:
    """What a family has that Llama has not. ``biases`` is the key of the biases of q, k and v, or True."""

    model_type: str
    title: str
    eps: float = 1e-6
    biases: str | bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    head_size: int | None = None
    mixture: _Mixture | None = None
    unsupported: tuple[str, ...] = ()
    """Keys that must be false or absent."""


def _read(variant: _Variant, settings: Settings) -> Architecture:
    width, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    kv_heads = settings.size("num_key_value_heads", heads)
    head_size = settings.size("head_dim", variant.head_size or width // heads)
    for key in variant.unsupported:
        settings.only(key, False)
    _full_attention(settings)
    biased = (
        variant.biases
        if isinstance(variant.biases, bool)
        else settings.flag(variant.biases, variant.mixture is not None)
    )
    backbone = Backbone(
        head_size=head_size,
        activation=settings.one_of("hidden_act", _ACTIVATIONS, "silu"),  # pyright: ignore[reportArgumentType]
        norm_eps=settings.number("rms_norm_eps", variant.eps),
        rotary_base=_rotary_base(settings),
        biases="qkv" if biased else "none",
        tied=settings.flag("tie_word_embeddings", False),
        qk_norm=variant.qk_norm,
        shared_gate=variant.mixture is not None and variant.mixture.shared,
    )
    parts = [_part(variant.mixture, settings, index) for index in range(settings.size("num_hidden_layers"))]
    return Architecture(Stack(width, tuple(Layer(Attention(heads, kv_heads), part) for part in parts)), backbone)


def _full_attention(settings: Settings) -> None:
    """Raises MoesaicError where some layers attend to a window only."""
    kinds = settings.listed("layer_types")
    if "sliding_attention" in kinds:
        raise settings.error("cannot be represented exactly", "layer_types", "sliding_attention", "full_attention")
    if settings.get("use_sliding_window", None) is not False and not kinds:
        settings.only("sliding_window", None)


def _rotary_base(settings: Settings) -> float:
    """The base of rotary angles, in either spelling. Raises MoesaicError for scaled and partial rotation."""
    rope = settings.mapping("rope_parameters")
    scaling = settings.mapping("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise settings.error("cannot be represented exactly", "rope_scaling", kind, "default, without scaling")
    fraction = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", None))
    if fraction not in (None, 1, 1.0):
        raise settings.error("cannot be represented exactly", "partial_rotary_factor", fraction, "1.0")
    return Settings(rope, settings.path).number("rope_theta", settings.number("rope_theta", _BASE))


def _part(mixture: _Mixture | None, settings: Settings, index: int) -> FeedForward:
    if mixture is None or not _is_sparse(mixture, settings, index):
        return FeedForward((settings.size("intermediate_size"),))
    normalised = mixture.normalised is None or settings.flag(mixture.normalised, False)
    router = Router(
        "top_k", k=settings.size("num_experts_per_tok", mixture.k), weights="sum" if normalised else "softmax"
    )
    experts = settings.spelled(mixture.experts, "num_experts", "num_local_experts")
    shared = settings.size("shared_expert_intermediate_size", 5632) if mixture.shared else 0
    return FeedForward((settings.size(mixture.size),) * settings.size(experts), router, shared)


def _is_sparse(mixture: _Mixture, settings: Settings, index: int) -> bool:
    if not mixture.dense_layers:
        return True
    step = settings.size("decoder_sparse_step", 1)
    return index not in (settings.listed("mlp_only_layers")) and (index + 1) % step == 0


def _write(variant: _Variant, architecture: Architecture, vocab_size: int) -> dict[str, Any]:
    stack, backbone = architecture.output, architecture.backbone
    first, mixture = stack.layers[0], variant.mixture
    dense = [layer.feed_forward.router is None for layer in stack.layers]
    parts = [layer.feed_forward for layer in stack.layers]
    found: dict[str, Any] = {
        "model_type": variant.model_type,
        "vocab_size": vocab_size,
        "hidden_size": stack.width,
        "num_hidden_layers": len(stack.layers),
        "num_attention_heads": first.attention.heads,
        "num_key_value_heads": first.attention.kv_heads,
        "head_dim": backbone.head_size,
        "hidden_act": {ours: theirs for theirs, ours in _ACTIVATIONS.items()}.get(backbone.activation, "silu"),
        "rms_norm_eps": backbone.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": backbone.rotary_base},
        "tie_word_embeddings": backbone.tied,
        "intermediate_size": next((part.neurons for part in parts if part.router is None), parts[0].expert_sizes[0]),
    }
    if isinstance(variant.biases, str):
        found[variant.biases] = backbone.biases != "none"
    if mixture is not None:
        sparse = next((part for part in parts if part.router is not None), parts[0])
        found |= {mixture.size: sparse.expert_sizes[0], mixture.experts: sparse.experts}
        found["num_experts_per_tok"] = sparse.router.max_experts if sparse.router else 1
        if mixture.normalised is not None:
            found[mixture.normalised] = sparse.router is not None and sparse.router.weights == "sum"
        if mixture.shared:
            found["shared_expert_intermediate_size"] = sparse.shared_size
        if mixture.dense_layers:
            found["mlp_only_layers"] = [index for index, whole in enumerate(dense) if whole]
    return found


def _names(variant: _Variant, architecture: Architecture) -> Names:
    backbone = architecture.backbone
    names = {
        "stacks.decoder.embedding.weight": [Piece("model.embed_tokens.weight")],
        "stacks.decoder.norm.weight": [Piece("model.norm.weight")],
    }
    if not backbone.tied:
        names["output"] = [Piece("lm_head.weight")]
    for index, layer in enumerate(architecture.output.layers):
        own, name = f"stacks.decoder.layers.{index}", f"model.layers.{index}"
        names[f"{own}.attention_norm.weight"] = [Piece(f"{name}.input_layernorm.weight")]
        names[f"{own}.feed_forward_norm.weight"] = [Piece(f"{name}.post_attention_layernorm.weight")]
        for letter in "qkvo":
            names[f"{own}.attention.{letter}"] = [Piece(f"{name}.self_attn.{letter}_proj.weight")]
            if backbone.biases == "qkv" and letter != "o":
                names[f"{own}.attention.{letter}_bias"] = [Piece(f"{name}.self_attn.{letter}_proj.bias")]
            if backbone.qk_norm != "none" and letter in "qk":
                names[f"{own}.attention.{letter}_norm"] = [Piece(f"{name}.self_attn.{letter}_norm.weight")]
        names |= _feed_forward_names(variant, layer.feed_forward, f"{own}.feed_forward", name)
    return names


def _feed_forward_names(variant: _Variant, part: FeedForward, own: str, name: str) -> dict[str, list[Piece]]:
    """A bank is its shared expert's rows and then each expert's, all under the same three names."""
    dense = ("gate_proj", "up_proj", "down_proj")
    if part.router is None:
        places = [(f"{name}.mlp", dense, part.neurons)]
        names: dict[str, list[Piece]] = {}
    else:
        assert variant.mixture is not None
        block = f"{name}.{variant.mixture.block}"
        names = {f"{own}.router": [Piece(f"{block}.gate.weight")]}
        places = [(f"{block}.experts.{e}", variant.mixture.matrices, n) for e, n in enumerate(part.expert_sizes)]
        if part.shared_size:
            names[f"{own}.shared_gate"] = [Piece(f"{block}.shared_expert_gate.weight", flat=True)]
            places.insert(0, (f"{block}.shared_expert", dense, part.shared_size))
    for number, ours in enumerate(("gate", "up", "down")):
        names[f"{own}.{ours}"] = [
            Piece(f"{place}.{matrices[number]}.weight", transposed=ours == "down", count=count)
            for place, matrices, count in places
        ]
    return names


_W = ("w1", "w3", "w2")
_VARIANTS = (
    _Variant("llama", "Llama, SmolLM", unsupported=("attention_bias", "mlp_bias")),
    _Variant("mistral", "Mistral without sliding window"),
    _Variant("qwen2", "Qwen2", biases=True),
    _Variant("qwen3", "Qwen3", qk_norm="head", head_size=128, unsupported=("attention_bias",)),
    _Variant("mixtral", "Mixtral", 1e-5,
             mixture=_Mixture("num_local_experts", "intermediate_size", "block_sparse_moe", _W, 2, None)),
    _Variant("qwen2_moe", "Qwen2-MoE", biases="qkv_bias",
             mixture=_Mixture("num_experts", "moe_intermediate_size", k=4, shared=True, dense_layers=True)),
    _Variant("qwen3_moe", "Qwen3-MoE", qk_norm="head", unsupported=("attention_bias",),
             mixture=_Mixture("num_experts", "moe_intermediate_size", dense_layers=True)),
    _Variant("olmoe", "OLMoE", 1e-5, qk_norm="all", unsupported=("attention_bias", "clip_qkv"),
             mixture=_Mixture("num_experts", "intermediate_size")),
)  # fmt: skip

FAMILIES = tuple(
    Family(
        variant.model_type,
        variant.title,
        partial(_read, variant),
        partial(_write, variant),
        partial(_names, variant),
        prefix="model.",
        ignored=("rotary_emb.inv_freq",),
    )
    for variant in _VARIANTS
)
