"""GPT-2 and OPT: learned positions, LayerNorm, biases, no gate."""

from __future__ import annotations

from typing import Any

from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer
from moesaic.search_spaces.architecture import Stack
from moesaic.supernet.convert.family import Family, Settings
from moesaic.supernet.convert.names import Names, Piece

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_OPT_OFFSET = 2
"""Rows of OPT's table of positions that no token uses."""


def _architecture(
    settings: Settings, width: int, depth: int, heads: int, neurons: int, activation: str, eps: float, positions: int
) -> Architecture:
    backbone = Backbone(
        head_size=width // heads,
        activation=activation,  # pyright: ignore[reportArgumentType]
        norm="layer",
        norm_eps=eps,
        positions="learned",
        max_positions=positions,
        biases="all",
        tied=settings.flag("tie_word_embeddings", True),
    )
    return Architecture(Stack(width, (Layer(Attention(heads, heads), FeedForward((neurons,))),) * depth), backbone)


def _read_gpt2(settings: Settings) -> Architecture:
    settings.only("scale_attn_weights", True)
    settings.only("scale_attn_by_inverse_layer_idx", False)
    settings.only("add_cross_attention", False)
    width = settings.size("n_embd", 768)
    return _architecture(
        settings,
        width,
        settings.size("n_layer", 12),
        settings.size("n_head", 12),
        settings.size("n_inner", 4 * width),
        settings.one_of("activation_function", _ACTIVATIONS, "gelu_new"),
        settings.number("layer_norm_epsilon", 1e-5),
        settings.size("n_positions", 1024),
    )


def _write_gpt2(architecture: Architecture, vocab_size: int) -> dict[str, Any]:
    stack, backbone = architecture.output, architecture.backbone
    return {
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_positions": backbone.max_positions,
        "n_embd": stack.width,
        "n_layer": len(stack.layers),
        "n_head": stack.layers[0].attention.heads,
        "n_inner": stack.layers[0].feed_forward.neurons,
        "activation_function": _theirs(backbone.activation),
        "layer_norm_epsilon": backbone.norm_eps,
        "tie_word_embeddings": backbone.tied,
    }


def _names_gpt2(architecture: Architecture) -> Names:
    width = architecture.output.width
    names = {
        "stacks.decoder.embedding.weight": [Piece("transformer.wte.weight")],
        "stacks.decoder.positions.weight": [Piece("transformer.wpe.weight")],
        **_norm("stacks.decoder.norm", "transformer.ln_f"),
        **_output(architecture),
    }
    for index in range(len(architecture.output.layers)):
        own, name = f"stacks.decoder.layers.{index}", f"transformer.h.{index}"
        names |= _norm(f"{own}.attention_norm", f"{name}.ln_1") | _norm(f"{own}.feed_forward_norm", f"{name}.ln_2")
        for third, letter in enumerate("qkv"):
            rows = (third * width, (third + 1) * width)
            names[f"{own}.attention.{letter}"] = [Piece(f"{name}.attn.c_attn.weight", True, rows)]
            names[f"{own}.attention.{letter}_bias"] = [Piece(f"{name}.attn.c_attn.bias", rows=rows)]
        names[f"{own}.attention.o"] = [Piece(f"{name}.attn.c_proj.weight", True)]
        names[f"{own}.attention.o_bias"] = [Piece(f"{name}.attn.c_proj.bias")]
        names[f"{own}.feed_forward.up"] = [Piece(f"{name}.mlp.c_fc.weight", True)]
        names[f"{own}.feed_forward.up_bias"] = [Piece(f"{name}.mlp.c_fc.bias")]
        names[f"{own}.feed_forward.down"] = [Piece(f"{name}.mlp.c_proj.weight")]
        names[f"{own}.feed_forward.down_bias"] = [Piece(f"{name}.mlp.c_proj.bias")]
    return names


def _read_opt(settings: Settings) -> Architecture:
    width = settings.size("hidden_size", 768)
    settings.only("do_layer_norm_before", True)
    settings.only("_remove_final_layer_norm", False)
    settings.only("enable_bias", True)
    settings.only("layer_norm_elementwise_affine", True)
    settings.only("word_embed_proj_dim", width)
    return _architecture(
        settings,
        width,
        settings.size("num_hidden_layers", 12),
        settings.size("num_attention_heads", 12),
        settings.size("ffn_dim", 3072),
        settings.one_of("activation_function", _ACTIVATIONS, "relu"),
        1e-5,
        settings.size("max_position_embeddings", 2048),
    )


def _write_opt(architecture: Architecture, vocab_size: int) -> dict[str, Any]:
    stack, backbone = architecture.output, architecture.backbone
    return {
        "model_type": "opt",
        "vocab_size": vocab_size,
        "hidden_size": stack.width,
        "word_embed_proj_dim": stack.width,
        "num_hidden_layers": len(stack.layers),
        "num_attention_heads": stack.layers[0].attention.heads,
        "ffn_dim": stack.layers[0].feed_forward.neurons,
        "max_position_embeddings": backbone.max_positions,
        "activation_function": _theirs(backbone.activation),
        "tie_word_embeddings": backbone.tied,
    }


def _names_opt(architecture: Architecture) -> Names:
    positions = architecture.backbone.max_positions or 0
    rows = (_OPT_OFFSET, positions + _OPT_OFFSET)
    names = {
        "stacks.decoder.embedding.weight": [Piece("model.decoder.embed_tokens.weight")],
        "stacks.decoder.positions.weight": [Piece("model.decoder.embed_positions.weight", rows=rows)],
        **_norm("stacks.decoder.norm", "model.decoder.final_layer_norm"),
        **_output(architecture),
    }
    for index in range(len(architecture.output.layers)):
        own, name = f"stacks.decoder.layers.{index}", f"model.decoder.layers.{index}"
        names |= _norm(f"{own}.attention_norm", f"{name}.self_attn_layer_norm")
        names |= _norm(f"{own}.feed_forward_norm", f"{name}.final_layer_norm")
        for ours, theirs in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}.items():
            names[f"{own}.attention.{ours}"] = [Piece(f"{name}.self_attn.{theirs}.weight")]
            names[f"{own}.attention.{ours}_bias"] = [Piece(f"{name}.self_attn.{theirs}.bias")]
        for ours, theirs in {"up": "fc1", "down": "fc2"}.items():
            names[f"{own}.feed_forward.{ours}"] = [Piece(f"{name}.{theirs}.weight", ours == "down")]
            names[f"{own}.feed_forward.{ours}_bias"] = [Piece(f"{name}.{theirs}.bias")]
    return names


def _norm(own: str, name: str) -> dict[str, list[Piece]]:
    return {f"{own}.{kind}": [Piece(f"{name}.{kind}")] for kind in ("weight", "bias")}


def _output(architecture: Architecture) -> dict[str, list[Piece]]:
    return {} if architecture.backbone.tied else {"output": [Piece("lm_head.weight")]}


def _theirs(activation: str) -> str:
    return next((theirs for theirs, ours in _ACTIVATIONS.items() if ours == activation), activation)


FAMILIES = (
    Family("gpt2", "GPT-2", _read_gpt2, _write_gpt2, _names_gpt2, "transformer.",
           (".attn.bias", ".attn.masked_bias"), "n_positions"),
    Family("opt", "OPT", _read_opt, _write_opt, _names_opt, "model."),
)  # fmt: skip
