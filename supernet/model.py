"""The one model class: a Transformer sized for an architecture, which also runs any smaller one as a slice of itself.

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
from moesaic.supernet.attention import SelfAttention
from moesaic.supernet.batch import Inputs
from moesaic.supernet.cache import KeyValueCache
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.heads import MaskedHead
from moesaic.supernet.norms import Norm
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
    def __init__(self, width: int, layer: Layer, backbone: Backbone, sharing: Sharing):
        super().__init__()
        self.post_norm = backbone.norm_place == "post"
        if layer.attention.heads:
            self.attention_norm = Norm(width, backbone)
            self.attention = SelfAttention(width, layer.attention, backbone)
        if layer.feed_forward.experts:
            self.feed_forward_norm = Norm(width, backbone)
            self.feed_forward = SparseFeedForward(width, layer.feed_forward, backbone, sharing)

    def where(self, width: int, layer: Layer) -> dict[str, Region]:
        """The region of each parameter that ``layer`` uses. Raises ValueError where it does not fit."""
        regions: dict[str, Region] = {}
        for name, part, there in (
            ("attention", layer.attention, layer.attention.heads),
            ("feed_forward", layer.feed_forward, layer.feed_forward.experts),
        ):
            if there:
                module = getattr(self, name, None)
                if module is None:
                    raise ValueError(f"there is no {name} part")
                regions |= inside(f"{name}_norm", getattr(self, f"{name}_norm").where(width))
                regions |= inside(name, module.where(width, part))
        return regions

    def forward(self, x: Tensor, layer: Layer, inputs: Inputs) -> tuple[Tensor, Routing | None]:
        return self.feed(self.attend(x, layer, inputs), layer, inputs)

    def attend(self, x: Tensor, layer: Layer, inputs: Inputs) -> Tensor:
        """[B, S, D] to [B, S, D]: the states after attention."""
        if not layer.attention.heads:
            return x
        out = self.attention(self.attended(x), layer.attention, inputs)
        return self.attention_norm(x + out) if self.post_norm else x + out

    def attended(self, x: Tensor) -> Tensor:
        """What attention reads of the layer's input."""
        return x if self.post_norm else self.attention_norm(x)

    def feed(self, x: Tensor, layer: Layer, inputs: Inputs) -> tuple[Tensor, Routing | None]:
        """[B, S, D] to [B, S, D]: the layer's states, from those after attention, and the routing."""
        if not layer.feed_forward.experts:
            return x, None
        out, routing = self._feed_forward(self.reads(x), layer, inputs)
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
    """From token ids to hidden states: embedding, positions, layers, norm."""

    def __init__(self, stack: Stack, vocab_size: int, backbone: Backbone, sharing: Sharing):
        super().__init__()
        width = stack.width
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(backbone.max_positions, width) if backbone.max_positions else None
        self.embedding_norm = Norm(width, backbone) if backbone.embedding_norm else None
        self.layers = nn.ModuleList(TransformerLayer(width, layer, backbone, sharing) for layer in stack.layers)
        self.norm = Norm(width, backbone) if backbone.norm_place == "pre" else None

    def initialise(self, write_std: float) -> None:
        for embedding in (self.embedding, self.positions):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)

    def where(self, stack: Stack) -> dict[str, Region]:
        """The region of each parameter that ``stack`` uses. Raises ValueError where it does not fit."""
        if len(stack.layers) > len(self.layers):
            raise ValueError(f"{len(stack.layers)} layers exceed {len(self.layers)}")
        width = stack.width
        regions = {"embedding.weight": Region.first(self.embedding.num_embeddings, width)}
        if self.positions is not None:
            regions["positions.weight"] = Region.first(self.positions.num_embeddings, width)
        for name, norm in (("embedding_norm", self.embedding_norm), ("norm", self.norm)):
            if norm is not None:
                regions |= inside(name, norm.where(width))
        for index, (module, layer) in enumerate(zip(self.layers, stack.layers, strict=False)):
            assert isinstance(module, TransformerLayer)
            regions |= inside(f"layers.{index}", module.where(width, layer))
        return regions

    def forward(
        self, name: str, tokens: Tensor, stack: Stack, mask: Tensor | None, cache: KeyValueCache | None
    ) -> tuple[Tensor, list[Routing | None]]:
        """Hidden states [B, S, D] of ``tokens`` [B, S]; ``name`` is the stack's name in its slots."""
        inputs = Inputs(stack.causal, mask if cache is None else cache.seen(mask, tokens.shape[1]))
        x = self.embedded(tokens, stack, inputs.mask, 0 if cache is None else cache.length)
        routings = []
        for index, (module, layer) in enumerate(zip(self.layers, stack.layers, strict=False)):
            own = inputs if cache is None else replace(inputs, cache=cache.layer(name, index))
            x, routing = module(x, layer, own)
            routings.append(routing)
        return x if self.norm is None else self.norm(x), routings

    def embedded(self, tokens: Tensor, stack: Stack, mask: Tensor | None = None, start: int = 0) -> Tensor:
        """[B, S, D] what the first layer reads of tokens [B, S], the first of which has position ``start``."""
        x = F.embedding(tokens, self.embedding.weight[:, : stack.width])
        if self.positions is not None:
            x = x + self._positions(mask, start, tokens.shape[1], x.device)[..., : stack.width]
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _positions(self, mask: Tensor | None, start: int, length: int, device: torch.device) -> Tensor:
        """[S, D_max], or with padding [B, S, D_max]: a sequence's first token has position 0, also after padding.

        Raises
        ------
        MoesaicError : there are more positions than vectors.
        """
        assert self.positions is not None
        if start + length > self.positions.num_embeddings:
            raise MoesaicError(
                "the sequence is longer than the learned positions reach",
                found=f"{start + length} positions",
                allowed=f"at most max_positions = {self.positions.num_embeddings}",
            )
        if mask is None:
            return self.positions.weight[start : start + length]
        return self.positions((mask.cumsum(1) - 1).clamp(min=0)[:, -length:])


class Transformer(nn.Module):
    """A language model: a stack that turns tokens into states, and a head that turns these into logits.

    Parameters
    ----------
    architecture : the largest architecture; it determines the shapes of the weights and runs by default.
    vocab_size : tokens of the vocabulary, V.
    sharing : which rows of a bank the experts of a smaller architecture take.
    """

    def __init__(self, architecture: Architecture, vocab_size: int, sharing: Sharing = "nested"):
        super().__init__()
        backbone, self.architecture, self.vocab_size = architecture.backbone, architecture, vocab_size
        self.sharing: Sharing = sharing
        self.stacks = nn.ModuleDict(
            {
                name: TransformerStack(stack, vocab_size, backbone, sharing)
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
        narrow ones stay on a plateau for a random number of steps."""
        write_std = 0.002 / (2 * len(self.architecture.layers)) ** 0.5
        for module in self.modules():
            if isinstance(module, TransformerStack | SelfAttention | SparseFeedForward | MaskedHead):
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

    def forward(self, tokens: Tensor, architecture: Architecture | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] of token ids [B, S], computed with the slice ``architecture`` (by default, all of it);
        without a head, the final states [B, S, D]."""
        return self.run(tokens, architecture, mask=mask).logits

    def run(
        self,
        tokens: Tensor,
        architecture: Architecture | None = None,
        cache: KeyValueCache | None = None,
        mask: Tensor | None = None,
    ) -> Output:
        """``forward`` that also returns the routing.

        With ``cache``, the tokens follow the cached ones and are added to it. ``mask`` [B, S] is False at padding,
        where logits are undefined.

        Raises
        ------
        MoesaicError : the architecture does not fit into this model, or the tokens not into the cache.
        """
        states, routings = self.states(tokens, architecture, cache, mask)
        return Output(self.logits(states), routings)

    def states(
        self,
        tokens: Tensor,
        architecture: Architecture | None = None,
        cache: KeyValueCache | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Routing | None, ...]]:
        """What ``logits`` reads, [B, S, D], and the routing; see ``run``."""
        architecture = self.architecture if architecture is None else architecture
        if architecture is not self.architecture:
            self.where(architecture)
        if cache is not None:
            cache.check(tokens, architecture)
        (name, stack), *others = architecture.stacks.items()
        if others:
            raise MoesaicError(
                "cannot run a network of several stacks", found=list(architecture.stacks), allowed="one stack"
            )
        x, routings = self._stack(name)(name, tokens, stack, mask, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        return x, tuple(routings)

    def logits(self, states: Tensor) -> Tensor:
        """[B, S, D] to [B, S, V]; without a head, the states themselves."""
        if self.architecture.backbone.head == "none":
            return states
        (name,) = self.stacks
        whole = self._stack(name).embedding.weight if self.output is None else self.output
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
            extracted = Transformer(architecture, self.vocab_size, self.sharing)
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
                regions |= inside(f"stacks.{name}", self._stack(name).where(stack))
        except ValueError as error:
            raise MoesaicError(f"architecture {architecture.fingerprint} does not fit this model: {error}") from None
        if self.output is not None:
            regions["output"] = Region.first(self.vocab_size, architecture.output.width)
        if self.head is not None:
            regions |= inside("head", self.head.where(architecture.output.width))
        return regions

    def _stack(self, name: str) -> TransformerStack:
        module = self.stacks[name]
        assert isinstance(module, TransformerStack)
        return module
