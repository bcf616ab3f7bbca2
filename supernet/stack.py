"""A stack of layers: from token ids, through attention, cross-attention and feed-forward parts, to hidden states."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels import Routing
from moesaic.search_spaces import Backbone, Layer, MoesaicError, Stack
from moesaic.supernet.attention import EncoderAttention, SelfAttention
from moesaic.supernet.batch import Inputs
from moesaic.supernet.cache import Past
from moesaic.supernet.dropout import Dropout
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.memory import Memory
from moesaic.supernet.norms import Norm
from moesaic.supernet.positions import sinusoids
from moesaic.supernet.regions import Region, inside
from moesaic.supernet.sharing import Sharing


class TransformerLayer(nn.Module):
    """``memory_width`` is that of the states that cross-attention reads."""

    def __init__(self, width: int, layer: Layer, backbone: Backbone, sharing: Sharing, memory_width: int = 0):
        super().__init__()
        self.post_norm = backbone.norm_place == "post"
        if layer.attention.heads:
            self.attention_norm = Norm(width, backbone)
            self.attention = SelfAttention(width, layer.attention, backbone)
        if layer.cross is not None:
            self.cross_norm = Norm(width, backbone)
            self.cross = EncoderAttention(width, layer.cross, backbone, memory_width)
        if layer.feed_forward.experts:
            self.feed_forward_norm = Norm(width, backbone)
            self.feed_forward = SparseFeedForward(width, layer.feed_forward, backbone, sharing)

    def where(self, width: int, layer: Layer, memory_width: int = 0) -> dict[str, Region]:
        """The region of each parameter that ``layer`` uses. Raises ValueError where it does not fit."""
        regions: dict[str, Region] = {}
        for name, part, there in (
            ("attention", layer.attention, layer.attention.heads),
            ("cross", layer.cross, layer.cross is not None),
            ("feed_forward", layer.feed_forward, layer.feed_forward.experts),
        ):
            if there:
                module = getattr(self, name, None)
                if module is None:
                    raise ValueError(f"there is no {name} part")
                reads = (memory_width,) if name == "cross" else ()
                regions |= inside(f"{name}_norm", getattr(self, f"{name}_norm").where(width))
                regions |= inside(name, module.where(width, part, *reads))
        return regions

    def forward(self, x: Tensor, layer: Layer, inputs: Inputs) -> tuple[Tensor, Routing | None]:
        return self.feed(self.attend(x, layer, inputs), layer, inputs)

    def attend(self, x: Tensor, layer: Layer, inputs: Inputs) -> Tensor:
        """[B, S, D] to [B, S, D]: the states after attention, and after cross-attention where there is some."""
        if layer.attention.heads:
            out = inputs.dropped(self.attention(self.attended(x), layer.attention, inputs))
            x = self.attention_norm(x + out) if self.post_norm else x + out
        if layer.cross is not None:
            out = inputs.dropped(self.cross.cross(x if self.post_norm else self.cross_norm(x), layer.cross, inputs))
            x = self.cross_norm(x + out) if self.post_norm else x + out
        return x

    def attended(self, x: Tensor) -> Tensor:
        """What attention reads of the layer's input."""
        return x if self.post_norm else self.attention_norm(x)

    def feed(self, x: Tensor, layer: Layer, inputs: Inputs) -> tuple[Tensor, Routing | None]:
        """[B, S, D] to [B, S, D]: the layer's states, from those after attention, and the routing."""
        if not layer.feed_forward.experts:
            return x, None
        out, routing = self._feed_forward(self.reads(x), layer, inputs)
        out = inputs.dropped(out)
        return self.feed_forward_norm(x + out) if self.post_norm else x + out, routing

    def reads(self, x: Tensor) -> Tensor:
        """What the feed-forward part reads of the states after attention."""
        return x if self.post_norm else self.feed_forward_norm(x)

    def _feed_forward(self, x: Tensor, layer: Layer, inputs: Inputs) -> tuple[Tensor, Routing | None]:
        """[B, S, D] to [B, S, D]; padding is not routed and gives zeros."""
        flat = x.flatten(0, 1)
        if inputs.mask is None:
            out, routing = self.feed_forward(flat, layer.feed_forward)
            return out.view_as(x), routing
        places = inputs.mask[:, -x.shape[1] :].flatten().nonzero()[:, 0]
        out, routing = self.feed_forward(flat[places], layer.feed_forward)
        return torch.zeros_like(flat, dtype=out.dtype).index_copy(0, places, out).view_as(x), routing


class TransformerStack(nn.Module):
    """From token ids to hidden states: embedding, positions, layers, norm.

    ``embedding`` is the shape of the table of embeddings, which another stack may use too; None: it uses another's.
    """

    def __init__(
        self,
        stack: Stack,
        embedding: tuple[int, int] | None,
        backbone: Backbone,
        sharing: Sharing,
        memory_width: int = 0,
    ):
        super().__init__()
        width = stack.width
        self.embedding = None if embedding is None else nn.Embedding(*embedding)
        self.positions = nn.Embedding(backbone.max_positions, width) if backbone.max_positions else None
        self.sinusoidal = backbone.positions == "sinusoidal"
        self.embedding_norm = Norm(width, backbone) if backbone.embedding_norm else None
        self.layers = nn.ModuleList(
            TransformerLayer(width, layer, backbone, sharing, memory_width) for layer in stack.layers
        )
        self.norm = Norm(width, backbone) if backbone.norm_place == "pre" else None

    def initialise(self, embedding_std: float) -> None:
        for embedding in (self.embedding, self.positions):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=embedding_std)

    def where(self, stack: Stack, embedding_width: int, memory_width: int = 0) -> dict[str, Region]:
        """The region of each parameter that ``stack`` uses, of its table of embeddings ``embedding_width`` columns.
        Raises ValueError where it does not fit."""
        if len(stack.layers) > len(self.layers):
            raise ValueError(f"{len(stack.layers)} layers exceed {len(self.layers)}")
        width = stack.width
        regions: dict[str, Region] = {}
        if self.embedding is not None:
            regions["embedding.weight"] = Region.first(self.embedding.num_embeddings, embedding_width)
        if self.positions is not None:
            regions["positions.weight"] = Region.first(self.positions.num_embeddings, width)
        for name, norm in (("embedding_norm", self.embedding_norm), ("norm", self.norm)):
            if norm is not None:
                regions |= inside(name, norm.where(width))
        for index, (module, layer) in enumerate(zip(self.layers, stack.layers, strict=False)):
            assert isinstance(module, TransformerLayer)
            regions |= inside(f"layers.{index}", module.where(width, layer, memory_width))
        return regions

    def forward(
        self,
        name: str,
        tokens: Tensor,
        stack: Stack,
        mask: Tensor | None,
        cache: Past | None = None,
        memory: Memory | None = None,
        table: Tensor | None = None,
        kept: int = 1,
        dropout: Dropout | None = None,
    ) -> tuple[list[Tensor], list[Routing | None]]:
        """Hidden states [B, S, D] of ``tokens`` [B, S] after each of the last ``kept`` layers; ``name`` is the stack's
        name in its slots, ``table`` the embeddings where it has none of its own."""
        seen = mask if cache is None else cache.seen(mask, tokens.shape[1])
        inputs = Inputs(stack.causal, seen, memory=memory, dropout=dropout)
        x = inputs.dropped(self.embedded(tokens, stack, seen, 0 if cache is None else cache.length, table))
        states, routings = [], []
        for index, (module, layer) in enumerate(zip(self.layers, stack.layers, strict=False)):
            own = inputs if cache is None else replace(inputs, cache=cache.layer(name, index))
            x, routing = module(x, layer, own)
            routings.append(routing)
            if index >= len(stack.layers) - kept:
                states.append(x if self.norm is None else self.norm(x))
        return states, routings

    def embedded(
        self,
        tokens: Tensor,
        stack: Stack,
        mask: Tensor | None = None,
        start: int = 0,
        table: Tensor | None = None,
    ) -> Tensor:
        """[B, S, D] what the first layer reads of tokens [B, S], the first of which has position ``start``."""
        if table is None:
            assert self.embedding is not None
            table = self.embedding.weight
        x = F.embedding(tokens, table[:, : stack.width])
        if self.positions is not None:
            x = x + self._positions(self.positions.weight, mask, start, tokens.shape[1])[..., : stack.width]
        elif self.sinusoidal:
            vectors = sinusoids(start + tokens.shape[1], stack.width, x.device)
            x = x * stack.width**0.5 + self._positions(vectors, mask, start, tokens.shape[1])
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _positions(self, vectors: Tensor, mask: Tensor | None, start: int, length: int) -> Tensor:
        """[S, D], or with padding [B, S, D], of ``vectors`` [P, D]: a sequence's first token has position 0, also after
        padding.

        Raises
        ------
        MoesaicError : there are more positions than vectors.
        """
        if start + length > len(vectors):
            raise MoesaicError(
                "the sequence is longer than the learned positions reach",
                found=f"{start + length} positions",
                allowed=f"at most max_positions = {len(vectors)}",
            )
        if mask is None:
            return vectors[start : start + length]
        return F.embedding((mask.cumsum(1) - 1).clamp(min=0)[:, -length:], vectors)
