"""The parts of a layer (routers, feed-forward parts, attention), and the backbone that a family of models shares.

Equal parts are equal values: experts are stored largest first, since their order has no meaning, and routers in a
canonical form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from moesaic.search_spaces.errors import MoesaicError

TILE = 16
"""Expert sizes are multiples of this: GPU loads need the alignment."""

STRICT = {"extra": "forbid"}

GATED = {"relu": False, "gelu": False, "gelu_tanh": False, "swiglu": True, "geglu": True, "geglu_tanh": True}
"""Activations, and whether their unit has a gate: ``swiglu`` is silu(gate) * up (arXiv 2002.05202)."""

RouterScore = Literal["softmax", "mass", "mlp"]
RouterWeights = Literal["sum", "softmax", "one"]


@dataclass(frozen=True)
class Router:
    """Which experts a token uses, and with what weights.

    ``top_k``: the ``k`` most probable. ``threshold`` (XMoE, arXiv 2403.18926): experts in decreasing order of
    probability while the mass ranked strictly ahead is below ``threshold``, at least one, at most ``max_k``.

    ``score``: probabilities are the ``softmax`` of a linear layer's logits, or, for the parts of a dense layer, each
    expert's share of the activation mass that is predicted: by a linear layer with bias (``mass``), or by the sum of
    that and an ``mlp`` with one hidden layer of ``hidden`` values.

    ``weights`` of a token's experts: ``sum`` divides their probabilities by their sum, so that the scale of the output
    does not depend on the number of experts; ``softmax`` leaves them as they are (XMoE, Switch); ``one`` adds the
    experts unweighted, so that all of them together are the dense layer (MoEfication, arXiv 2110.01786).
    """

    __pydantic_config__ = STRICT

    kind: Literal["top_k", "threshold"]
    k: int | None = None
    threshold: float | None = None
    max_k: int | None = None
    weights: RouterWeights = "sum"
    score: RouterScore = "softmax"

    def __post_init__(self) -> None:
        if self.kind == "top_k":
            if self.threshold is not None or self.max_k is not None:
                raise ValueError("a top_k router takes only k, not threshold or max_k")
            at_least(self.k, 1, "k")
        else:
            if self.k is not None:
                raise ValueError("a threshold router takes threshold and max_k, not k")
            at_least(self.max_k, 1, "max_k")
            if self.threshold is None or not 0 < self.threshold < 1:
                raise MoesaicError("threshold is a probability mass", found=self.threshold, allowed="0 < threshold < 1")

    @property
    def max_experts(self) -> int:
        """The largest number of experts one token may use."""
        most = self.k if self.kind == "top_k" else self.max_k
        assert most is not None
        return most

    @property
    def predicts_mass(self) -> bool:
        """Whether the experts are the parts of a dense layer, chosen by their predicted activation mass."""
        return self.score != "softmax"

    def hidden(self, width: int) -> int:
        """Hidden values of an ``mlp`` router that reads ``width`` values: an eighth, in whole tiles, at least 32. Other
        routers have none."""
        return max(2 * TILE, width // (8 * TILE) * TILE) if self.score == "mlp" else 0

    def for_experts(self, experts: int) -> Router:
        """The canonical form for ``experts`` experts: at most all of them; one that takes at most one is top-1.

        The j most probable of E experts hold a mass of j / E or more, so a threshold router keeps at most
        ceil(threshold * E) of them.
        """
        most = min(self.max_experts, experts)
        if self.threshold is not None:
            most = min(most, math.ceil(self.threshold * experts - 1e-9))
        if most == self.max_experts and (self.kind == "top_k" or most > 1):
            return self
        if self.kind == "top_k" or most == 1:
            return Router("top_k", k=most, weights=self.weights, score=self.score)
        return replace(self, max_k=most)

    def __str__(self) -> str:
        choice = f"top-{self.k}" if self.kind == "top_k" else f"mass {self.threshold:g}, max {self.max_k}"
        choice += {"softmax": "", "mass": " by activation mass", "mlp": " by activation mass of an MLP"}[self.score]
        return choice if self.weights == "sum" else f"{choice}, {self.weights} weights"


@dataclass(frozen=True)
class FeedForward:
    """Experts of one layer: neurons per expert, largest first. One expert without a router is a dense layer, none means
    that the layer has no feed-forward part.

    Every token also uses the ``shared_size`` neurons of the shared expert.
    """

    __pydantic_config__ = STRICT

    expert_sizes: tuple[int, ...]
    router: Router | None = None
    shared_size: int = 0

    def __post_init__(self) -> None:
        for size in dict.fromkeys(self.expert_sizes):
            tile_multiple(size, "expert size")
        if self.shared_size:
            tile_multiple(self.shared_size, "shared_size")
        if len(self.expert_sizes) < 2 and (self.router or self.shared_size):
            raise ValueError("a layer of one expert, or none, has neither router nor shared expert")
        if len(self.expert_sizes) > 1 and self.router is None:
            raise ValueError("a layer of several experts needs a router")
        if self.router and self.router.kind == "top_k" and self.router.max_experts > len(self.expert_sizes):
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
        return sum(self.expert_sizes[: self.router.max_experts if self.router else 1]) + self.shared_size


@dataclass(frozen=True)
class Attention:
    """Self-attention with ``heads`` query heads in groups that share ``kv_heads`` key/value heads. With 0 of both, the
    layer has no attention."""

    __pydantic_config__ = STRICT

    heads: int
    kv_heads: int

    def __post_init__(self) -> None:
        if self.heads == self.kv_heads == 0:
            return
        at_least(self.heads, 1, "heads")
        at_least(self.kv_heads, 1, "kv_heads")
        if self.heads % self.kv_heads:
            divisors = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise MoesaicError("kv_heads must divide heads", found=f"{self.kv_heads} of {self.heads}", allowed=divisors)


@dataclass(frozen=True)
class CrossAttention:
    """Attention of a decoder's layer to the states of the last ``span`` encoder layers, which stand one after the other
    (HAT, arXiv 2005.14187); heads as in ``Attention``."""

    __pydantic_config__ = STRICT

    heads: int
    kv_heads: int
    span: int = 1

    def __post_init__(self) -> None:
        at_least(self.heads, 1, "heads")
        at_least(self.span, 1, "span")
        Attention(self.heads, self.kv_heads)


@dataclass(frozen=True)
class Layer:
    """Attention, in a decoder with an encoder ``cross``-attention, then a feed-forward part. One that is not there
    costs nothing: its norm and biases are gone too."""

    __pydantic_config__ = STRICT

    attention: Attention
    feed_forward: FeedForward
    cross: CrossAttention | None = None

    @property
    def blocks(self) -> int:
        """How many of the three are there."""
        return (self.attention.heads > 0) + (self.cross is not None) + (self.feed_forward.experts > 0)


@dataclass(frozen=True)
class Backbone:
    """What a family of models fixes rather than searches. The defaults are those of Llama.

    ``head_size`` does not depend on the width. With ``qkv_width``, the queries of all heads have so many values
    together, and so have keys and values, whatever the number of heads (HAT); it takes the place of ``head_size``.
    ``norm`` is RMSNorm, or LayerNorm with its bias; ``norm_place`` is
    ``pre`` (blocks and the vocabulary layer read normed states) or ``post`` (the sum after a block is normed).
    ``embedding_norm`` norms the embeddings (BERT).

    ``positions``: ``rotary`` rotates the first ``rotary_fraction`` of a head by angles of base ``rotary_base`` (arXiv
    2104.09864), ``learned`` adds one of ``max_positions`` vectors to the embedding, ``sinusoidal`` adds sines and
    cosines of wavelengths up to 20,000 pi to the embedding times the root of the width (arXiv 1706.03762), ``none``
    adds nothing.

    ``biases``: ``qkv`` has them on query, key and value (Qwen2); ``all`` also on the output of attention and on both
    layers of the feed-forward part (GPT-2, OPT, BERT).

    ``head``: what becomes of the final states. A ``linear`` layer makes logits of them; ``masked`` has a layer of the
    same width, the activation and a norm before it, and a bias on the logits (BERT, arXiv 1810.04805); ``none`` leaves
    them as they are (sentence encoders).

    ``tied``: the vocabulary layer shares the embedding's weights. ``qk_norm``: queries and keys are normed (RMSNorm)
    before they are rotated, each ``head`` alone (Qwen3) or ``all`` of a token's heads together (OLMoE).
    ``shared_gate``: the output of a layer's shared expert is scaled by the sigmoid of a linear function of its input
    (Qwen2-MoE).
    """

    __pydantic_config__ = STRICT

    head_size: int = 32
    activation: Literal["relu", "gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh"] = "swiglu"
    norm: Literal["rms", "layer"] = "rms"
    norm_place: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-6
    embedding_norm: bool = False
    positions: Literal["rotary", "learned", "sinusoidal", "none"] = "rotary"
    rotary_base: float = 10_000.0
    rotary_fraction: float = 1.0
    max_positions: int | None = None
    biases: Literal["none", "qkv", "all"] = "none"
    head: Literal["linear", "masked", "none"] = "linear"
    tied: bool = True
    qk_norm: Literal["none", "head", "all"] = "none"
    shared_gate: bool = False
    qkv_width: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rotary_base", float(self.rotary_base))  # 500 and 500.0 are written alike
        at_least(self.head_size, 1, "head_size")
        if not 0 < self.norm_eps < 1:
            raise MoesaicError("norm_eps must be small", found=self.norm_eps, allowed="0 < norm_eps < 1")
        if self.qkv_width is not None:
            self._check_qkv_width(self.qkv_width)
        if self.positions == "rotary":
            if not 0 < self.rotary_fraction <= 1 or not 1 < self.rotary_base < math.inf:
                raise MoesaicError(
                    "impossible rotary positions",
                    found=f"base {self.rotary_base:g}, fraction {self.rotary_fraction:g}",
                    allowed="rotary_base > 1 and 0 < rotary_fraction <= 1",
                )
            if self.rotary_size % 2 or not self.rotary_size:
                raise MoesaicError(
                    "rotary positions rotate pairs of values",
                    found=f"{self.rotary_size} of a head_size of {self.head_size}",
                    allowed="an even head_size x rotary_fraction",
                )
        elif (self.rotary_base, self.rotary_fraction) != (Backbone.rotary_base, Backbone.rotary_fraction):
            raise MoesaicError(
                "rotary settings without rotary positions",
                found=f"positions: {self.positions}",
                allowed="positions: rotary",
            )
        if (self.positions == "learned") != (self.max_positions is not None):
            raise ValueError("max_positions is required by learned positions, and only by these")
        if self.max_positions is not None:
            at_least(self.max_positions, 1, "max_positions")
        if self.biases == "all" and self.gated:
            raise MoesaicError("a gated unit has no biases", found=self.activation, allowed="biases: none or qkv")
        if self.head == "masked" and self.gated:
            raise MoesaicError("a masked head has no gate", found=self.activation, allowed="head: linear or none")
        if self.head == "none" and not self.tied:
            raise MoesaicError("without a head there is no vocabulary layer", found="tied: false", allowed="tied: true")

    def _check_qkv_width(self, width: int) -> None:
        tile_multiple(width, "qkv_width")
        if self.head_size != Backbone.head_size:
            raise MoesaicError("a head has one size", found="qkv_width and head_size", allowed="one of the two")
        if self.positions == "rotary" or self.qk_norm != "none":
            raise MoesaicError(
                "with qkv_width, layers have heads of different sizes",
                found=f"positions: {self.positions}, qk_norm: {self.qk_norm}",
                allowed="positions: learned, sinusoidal or none, and qk_norm: none",
            )

    def widths(self, attention: Attention | CrossAttention) -> tuple[int, int]:
        """Values of a token's queries, and of its keys, over all heads.

        Raises
        ------
        MoesaicError : ``qkv_width`` cannot be divided among the heads.
        """
        if self.qkv_width is None:
            return attention.heads * self.head_size, attention.kv_heads * self.head_size
        if not attention.heads:
            return 0, 0
        if attention.heads != attention.kv_heads or self.qkv_width % attention.heads:
            raise MoesaicError(
                f"qkv_width {self.qkv_width} cannot be divided among the heads",
                found=f"heads {attention.heads}, kv_heads {attention.kv_heads}",
                allowed="as many kv_heads as heads, a divisor of it",
            )
        return self.qkv_width, self.qkv_width

    @property
    def gated(self) -> bool:
        """Whether a neuron has gate weights beside its up weights."""
        return GATED[self.activation]

    @property
    def matrices(self) -> int:
        """Weight rows per neuron: up and down, and the gate of a gated unit."""
        return 3 if self.gated else 2

    @property
    def rotary_size(self) -> int:
        """Values of a head that are rotated by position."""
        return round(self.head_size * self.rotary_fraction) if self.positions == "rotary" else 0

    @property
    def norm_vectors(self) -> int:
        """Vectors of a norm: scales, and the biases of a LayerNorm."""
        return 2 if self.norm == "layer" else 1


def at_least(value: int | None, least: int, name: str) -> None:
    """Raises MoesaicError unless ``value`` is there and ``least`` or more."""
    if value is None or value < least:
        raise MoesaicError(f"{name} is needed" if value is None else f"{name} is too small", allowed=f">= {least}")


def tile_multiple(value: int, name: str) -> None:
    """Raises MoesaicError unless ``value`` is a positive multiple of ``TILE``."""
    if value < TILE or value % TILE:
        nearest = max(TILE, round(value / TILE) * TILE)
        raise MoesaicError(f"{name} must be a multiple of {TILE}", found=value, nearest=nearest)
