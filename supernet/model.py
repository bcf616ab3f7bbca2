"""The one model class: a Transformer sized for an architecture, which also runs any smaller one as a slice of itself.

A model that translates has an encoder too, whose states its decoder attends to.

A supernet is this class built for the envelope of a search space. ``model(tokens, architecture=a)`` computes with
the slice ``a`` without copying weights or changing state. ``model.extract(a)`` copies the slice into a separate
model with the same outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels import Routing
from moesaic.search_spaces import Architecture, Backbone, Layer, MoesaicError, Stack
from moesaic.supernet.attention import EncoderAttention, SelfAttention
from moesaic.supernet.batch import Inputs
from moesaic.supernet.cache import KeyValueCache
from moesaic.supernet.dropout import Dropout
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.heads import MaskedHead
from moesaic.supernet.memory import Memory
from moesaic.supernet.norms import Norm
from moesaic.supernet.positions import sinusoids
from moesaic.supernet.regions import Region, inside
from moesaic.supernet.sharing import Sharing


@dataclass(frozen=True)
class Output:
    """``logits`` [B, S, V] (without a head the final states [B, S, D]) and, for each of ``architecture.layers``, its
    routing (None for a dense layer)."""

    logits: Tensor
    routings: tuple[Routing | None, ...]

    def balance_loss(self) -> Tensor:
        """Mean of ``Routing.balance_loss`` over sparse layers: 1 when balanced, 0 without sparse layers or tokens.

        Switch Transformers (arXiv 2101.03961) and XMoE (arXiv 2403.18926) sum over layers. The mean has the same scale
        for every depth, so slices with few and with many sparse layers are trained, and compared, under one objective.
        A weight w of this mean is w / L per layer in their terms, where L layers are sparse.
        """
        losses = [r.balance_loss() for r in self.routings if r is not None and len(r.probabilities)]
        return torch.stack(losses).mean() if losses else self.logits.new_zeros(())


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
        cache: KeyValueCache | None = None,
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


class Transformer(nn.Module):
    """A language model: a stack that turns tokens into states, and a head that turns these into logits; before them,
    in a model that translates, the encoder of the source.

    Parameters
    ----------
    architecture : the largest architecture; it determines the shapes of the weights and runs by default.
    vocab_size : tokens of the vocabulary, V.
    sharing : which rows of a bank the experts of a smaller architecture take.
    source_vocab_size : tokens of the encoder's vocabulary; None: both stacks have one, and one table of embeddings.
    """

    def __init__(
        self,
        architecture: Architecture,
        vocab_size: int,
        sharing: Sharing = "nested",
        source_vocab_size: int | None = None,
    ):
        super().__init__()
        backbone, self.architecture, self.vocab_size = architecture.backbone, architecture, vocab_size
        self.sharing: Sharing = sharing
        self.source_vocab_size = source_vocab_size
        tables = {
            "encoder": source_vocab_size and (source_vocab_size, architecture.memory_width),
            "decoder": (vocab_size, self._embedding_width("decoder", architecture)),
        }
        self.stacks = nn.ModuleDict(
            {
                name: TransformerStack(stack, tables[name] or None, backbone, sharing, architecture.memory_width)
                for name, stack in architecture.stacks.items()
            }
        )
        width = architecture.output.width
        self.output = None if backbone.tied else nn.Parameter(torch.empty(vocab_size, width))
        self.head = MaskedHead(width, vocab_size, backbone) if backbone.head == "masked" else None
        self._initialise()

    def _initialise(self) -> None:
        """Weights that read from the residual stream start with standard deviation 1 / sqrt(D), so that heads and
        neurons distinguish tokens from the start. Those that write to it start with a tenth of the embedding's 0.02,
        divided by sqrt(2 L), so that the embedding dominates. With 0.02 everywhere (GPT-2), meant for wide models,
        narrow ones stay on a plateau for a random number of steps.

        Beside sinusoids, embeddings start with 1 / sqrt(D): times sqrt(D), they are as large (arXiv 1706.03762). With
        0.02 positions hide the tokens. The weights that write then start with 1 / sqrt(D), divided by sqrt(2 L)."""
        embedding_std, write_std = 0.02, 0.002
        if self.architecture.backbone.positions == "sinusoidal":
            embedding_std = write_std = self.architecture.output.width**-0.5
        write_std /= (2 * len(self.architecture.layers)) ** 0.5
        for module in self.modules():
            if isinstance(module, TransformerStack):
                module.initialise(embedding_std)
            elif isinstance(module, SelfAttention | SparseFeedForward | MaskedHead):
                module.initialise(write_std)
        if self.output is not None:
            nn.init.normal_(self.output, std=0.02)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def layers(self) -> list[TransformerLayer]:
        """Every layer, in the order of ``architecture.layers``."""
        return [module for module in self.modules() if isinstance(module, TransformerLayer)]

    def forward(
        self,
        tokens: Tensor,
        architecture: Architecture | None = None,
        mask: Tensor | None = None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V] of token ids [B, S], computed with the slice ``architecture`` (by default, all of it);
        without a head, the final states [B, S, D]."""
        return self.run(tokens, architecture, mask=mask, source=source, source_mask=source_mask).logits

    def run(
        self,
        tokens: Tensor,
        architecture: Architecture | None = None,
        cache: KeyValueCache | None = None,
        mask: Tensor | None = None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Output:
        """``forward`` that also returns the routing. With ``dropout``, after the embedding and each part of a layer, as
        in arXiv 1706.03762.

        With ``cache``, the tokens follow the cached ones and are added to it. ``mask`` [B, S] is False at padding,
        where logits are undefined. ``source`` [M, P] is what an encoder reads, padded where ``source_mask`` is False;
        there are B = n * M sequences, n consecutive ones for each source. A cache remembers it.

        Raises
        ------
        MoesaicError : the architecture does not fit into this model, or the tokens not into the cache.
        """
        states, routings = self.states(tokens, architecture, cache, mask, source, source_mask, dropout)
        return Output(self.logits(states), routings)

    def states(
        self,
        tokens: Tensor,
        architecture: Architecture | None = None,
        cache: KeyValueCache | None = None,
        mask: Tensor | None = None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, tuple[Routing | None, ...]]:
        """What ``logits`` reads, [B, S, D], and the routing; see ``run``. A source in the cache is not routed again."""
        architecture = self.architecture if architecture is None else architecture
        if architecture is not self.architecture:
            self.where(architecture)
        if cache is not None:
            cache.check(tokens, architecture)
        memory, before = None if cache is None else cache.memory, []
        if architecture.encoder is not None:
            if memory is None:
                memory, before = self._encoded(architecture, architecture.encoder, source, source_mask, dropout)
            else:
                before = [None] * len(architecture.encoder.layers)
        (x,), routings = self._stack("decoder")(
            "decoder", tokens, architecture.decoder, mask, cache, memory, dropout=dropout
        )
        if cache is not None:
            cache.length += tokens.shape[1]
            cache.memory = memory
        return x, (*before, *routings)

    def _encoded(
        self,
        architecture: Architecture,
        stack: Stack,
        source: Tensor | None,
        mask: Tensor | None,
        dropout: Dropout | None,
    ) -> tuple[Memory, list[Routing | None]]:
        """What the decoder reads of ``source`` [M, P], and the encoder's routing."""
        if source is None:
            raise MoesaicError("a model with an encoder translates", found="no source", allowed="source: token ids")
        spans = (layer.cross.span for layer in architecture.decoder.layers if layer.cross)
        module, table = self._stack("encoder"), self._stack("decoder").embedding
        table = table.weight if module.embedding is None and table is not None else None
        states, routings = module("encoder", source, stack, mask, table=table, kept=max(spans), dropout=dropout)
        return Memory(tuple(states), mask), routings

    def logits(self, states: Tensor) -> Tensor:
        """[B, S, D] to [B, S, V]; without a head, the states themselves."""
        if self.architecture.backbone.head == "none":
            return states
        table = self._stack("decoder").embedding
        whole = self.output if table is None or self.output is not None else table.weight
        assert whole is not None
        weight = whole[:, : states.shape[-1]]
        if self.head is None:
            return F.linear(states, weight)
        return F.linear(self.head(states), weight, self.head.bias)

    @torch.no_grad()
    def extract(self, architecture: Architecture) -> Transformer:
        """A separate model with a copy of the slice's weights.

        Raises
        ------
        MoesaicError : the architecture does not fit into this model.
        """
        regions, parameters = self.where(architecture), dict(self.named_parameters())
        with torch.device("meta"):  # initial weights would be overwritten, and would draw from the global generator
            extracted = Transformer(architecture, self.vocab_size, self.sharing, self.source_vocab_size)
        extracted = extracted.to(next(self.parameters()).dtype).to_empty(device=self.device)
        for name, parameter in extracted.named_parameters():
            parameter.copy_(regions[name].of(parameters[name]))
        return extracted

    def where(self, architecture: Architecture) -> dict[str, Region]:
        """The region of each parameter that the slice ``architecture`` uses, by the parameter's name.

        Raises
        ------
        MoesaicError : it is not a slice of this model.
        """
        try:
            if architecture.backbone != self.architecture.backbone:
                raise ValueError(f"backbone {architecture.backbone} is not {self.architecture.backbone}")
            if architecture.stacks.keys() != self.architecture.stacks.keys():
                raise ValueError(f"stacks {[*architecture.stacks]} are not {[*self.architecture.stacks]}")
            regions: dict[str, Region] = {}
            for name, stack in architecture.stacks.items():
                width = self._embedding_width(name, architecture)
                own = self._stack(name).where(stack, width, architecture.memory_width)
                regions |= inside(f"stacks.{name}", own)
        except ValueError as error:
            raise MoesaicError(f"architecture {architecture.fingerprint} does not fit this model: {error}") from None
        if self.output is not None:
            regions["output"] = Region.first(self.vocab_size, architecture.output.width)
        if self.head is not None:
            regions |= inside("head", self.head.where(architecture.output.width))
        return regions

    def _embedding_width(self, name: str, architecture: Architecture) -> int:
        """Columns of the stack's table of embeddings: those of the widest stack that uses it."""
        if self.source_vocab_size is not None:
            return architecture.stacks[name].width
        return max(stack.width for stack in architecture.stacks.values())

    def _stack(self, name: str) -> TransformerStack:
        module = self.stacks[name]
        assert isinstance(module, TransformerStack)
        return module
