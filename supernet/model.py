"""The one model class: a Transformer sized for an architecture, which also runs any smaller one as a slice of itself.

A model that translates has an encoder too, whose states its decoder attends to.

A supernet is this class built for the envelope of a search space. ``model(tokens, architecture=a)`` computes with
the slice ``a`` without copying weights or changing state. ``model.extract(a)`` copies the slice into a separate
model with the same outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels import Routing
from moesaic.search_spaces import Architecture, MoesaicError, Stack
from moesaic.supernet.attention import SelfAttention
from moesaic.supernet.cache import Past
from moesaic.supernet.dropout import Dropout
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.heads import MaskedHead
from moesaic.supernet.memory import Memory
from moesaic.supernet.regions import Region, inside
from moesaic.supernet.sharing import Sharing
from moesaic.supernet.stack import TransformerLayer, TransformerStack


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
        self.stacks = nn.ModuleDict(
            {
                name: TransformerStack(
                    stack, self._table_shape(name, architecture), backbone, sharing, architecture.memory_width
                )
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
        cache: Past | None = None,
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
        cache: Past | None = None,
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
        if architecture.encoder is None and source is not None:
            raise MoesaicError("a model without an encoder reads no source", found="source", allowed="tokens alone")
        if architecture.encoder is not None:
            if memory is None:
                memory, before = self._encoded(architecture, architecture.encoder, source, source_mask, dropout)
            else:
                before = [None] * len(architecture.encoder.layers)
        name = next(reversed(architecture.stacks))
        (x,), routings = self._stack(name)(name, tokens, architecture.output, mask, cache, memory, dropout=dropout)
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
        module = self._stack("encoder")
        table = self._table if module.embedding is None else module.embedding.weight
        kept = max(architecture.spans)
        states, routings = module("encoder", source, stack, mask, table=table, kept=kept, dropout=dropout)
        return Memory(tuple(states), mask), routings

    def logits(self, states: Tensor) -> Tensor:
        """[B, S, D] to [B, S, V]; without a head, the states themselves."""
        if self.architecture.backbone.head == "none":
            return states
        whole = self._table if self.output is None else self.output
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

    @property
    def _table(self) -> Tensor:
        """The embeddings of the tokens that the model predicts."""
        embedding = self._stack(next(reversed(self.architecture.stacks))).embedding
        assert embedding is not None
        return embedding.weight

    def _table_shape(self, name: str, architecture: Architecture) -> tuple[int, int] | None:
        """Of the embeddings of a stack of its own; None: an encoder reads the decoder's."""
        width = self._embedding_width(name, architecture)
        if name == "encoder":
            return None if self.source_vocab_size is None else (self.source_vocab_size, width)
        return self.vocab_size, width

    def _embedding_width(self, name: str, architecture: Architecture) -> int:
        """Columns of the stack's table of embeddings: those of the widest stack that uses it."""
        if self.source_vocab_size is not None:
            return architecture.stacks[name].width
        return max(stack.width for stack in architecture.stacks.values())

    def _stack(self, name: str) -> TransformerStack:
        module = self.stacks[name]
        assert isinstance(module, TransformerStack)
        return module
