"""BERT with its masked-token head, and as an encoder without a head (sentence encoders such as MiniLM).

Token types: every token is of type 0, as in a text that is not a pair. The vector of type 0 is folded into those of the
positions, since it is added wherever they are; that of type 1 is not used.
"""

from __future__ import annotations

from typing import Any

from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer
from moesaic.search_spaces.architecture import Stack
from moesaic.supernet.convert.family import Family, Settings
from moesaic.supernet.convert.names import Names, Piece

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_HEADS = {"BertForMaskedLM": "masked", "BertForPreTraining": "masked", "BertModel": "none"}
"""By the class that wrote the weights. Of two heads, that of the next sentence is not read."""

_IGNORED = (
    "embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias", "cls.seq_relationship.weight",
    "cls.seq_relationship.bias", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias",
    "cls.predictions.bias",
)  # fmt: skip
"""What sees no single token, and copies of tied weights."""


def _read(settings: Settings) -> Architecture:
    settings.only("position_embedding_type", "absolute")
    settings.only("is_decoder", False)
    settings.only("add_cross_attention", False)
    settings.only("is_encoder_decoder", False)
    head = _head(settings)
    width, heads = settings.size("hidden_size", 768), settings.size("num_attention_heads", 12)
    backbone = Backbone(
        head_size=width // heads,
        activation=settings.one_of("hidden_act", _ACTIVATIONS, "gelu"),  # pyright: ignore[reportArgumentType]
        norm="layer",
        norm_place="post",
        norm_eps=settings.number("layer_norm_eps", 1e-12),
        embedding_norm=True,
        positions="learned",
        max_positions=settings.size("max_position_embeddings", 512),
        biases="all",
        head=head,  # pyright: ignore[reportArgumentType]
        tied=head == "none" or settings.flag("tie_word_embeddings", True),
    )
    layer = Layer(Attention(heads, heads), FeedForward((settings.size("intermediate_size", 3072),)))
    return Architecture(Stack(width, (layer,) * settings.size("num_hidden_layers", 12), causal=False), backbone)


def _head(settings: Settings) -> str:
    found = settings.listed("architectures") or ["BertModel"]
    if len(found) != 1 or found[0] not in _HEADS:
        raise settings.error("cannot be represented exactly", "architectures", found, ", ".join(_HEADS))
    return _HEADS[found[0]]


def _write(architecture: Architecture, vocab_size: int) -> dict[str, Any]:
    stack, backbone = architecture.output, architecture.backbone
    first = stack.layers[0]
    return {
        "model_type": "bert",
        "architectures": ["BertModel" if backbone.head == "none" else "BertForMaskedLM"],
        "vocab_size": vocab_size,
        "hidden_size": stack.width,
        "num_hidden_layers": len(stack.layers),
        "num_attention_heads": first.attention.heads,
        "intermediate_size": first.feed_forward.neurons,
        "max_position_embeddings": backbone.max_positions,
        "type_vocab_size": 1,
        "hidden_act": {ours: theirs for theirs, ours in _ACTIVATIONS.items()}.get(backbone.activation, "gelu"),
        "layer_norm_eps": backbone.norm_eps,
        "tie_word_embeddings": backbone.tied,
    }


def _names(architecture: Architecture) -> Names:
    backbone = architecture.backbone
    base = "" if backbone.head == "none" else "bert."
    embeddings = f"{base}embeddings"
    names = {
        "stacks.decoder.embedding.weight": [Piece(f"{embeddings}.word_embeddings.weight")],
        "stacks.decoder.positions.weight": [
            Piece(f"{embeddings}.position_embeddings.weight", added=f"{embeddings}.token_type_embeddings.weight")
        ],
        **_norm("stacks.decoder.embedding_norm", f"{embeddings}.LayerNorm"),
    }
    for index in range(len(architecture.output.layers)):
        own, name = f"stacks.decoder.layers.{index}", f"{base}encoder.layer.{index}"
        names |= _norm(f"{own}.attention_norm", f"{name}.attention.output.LayerNorm")
        names |= _norm(f"{own}.feed_forward_norm", f"{name}.output.LayerNorm")
        for letter, theirs in {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}.items():
            names[f"{own}.attention.{letter}"] = [Piece(f"{name}.attention.{theirs}.weight")]
            names[f"{own}.attention.{letter}_bias"] = [Piece(f"{name}.attention.{theirs}.bias")]
        for ours, theirs in {"up": "intermediate.dense", "down": "output.dense"}.items():
            names[f"{own}.feed_forward.{ours}"] = [Piece(f"{name}.{theirs}.weight", ours == "down")]
            names[f"{own}.feed_forward.{ours}_bias"] = [Piece(f"{name}.{theirs}.bias")]
    if backbone.head == "masked":
        head = "cls.predictions"
        names |= _norm("head.norm", f"{head}.transform.LayerNorm")
        names["head.dense"] = [Piece(f"{head}.transform.dense.weight")]
        names["head.dense_bias"] = [Piece(f"{head}.transform.dense.bias")]
        names["head.bias"] = [Piece(f"{head}.bias" if backbone.tied else f"{head}.decoder.bias")]
    if not backbone.tied:
        names["output"] = [Piece("cls.predictions.decoder.weight")]
    return names


def _norm(own: str, name: str) -> dict[str, list[Piece]]:
    return {f"{own}.{kind}": [Piece(f"{name}.{kind}")] for kind in ("weight", "bias")}


FAMILIES = (
    Family(
        "bert", "BERT", _read, _write, _names, ignored=_IGNORED,
        older={".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta",
               "predictions.bias": "predictions.decoder.bias"},
    ),
)  # fmt: skip
