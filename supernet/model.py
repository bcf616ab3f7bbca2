"""The one model class: a Transformer sized for an architecture, which also runs any smaller one as a slice of itself.

A supernet is this class built for the envelope of a search space. ``model(tokens, architecture=a)`` computes with
the slice ``a`` without copying a weight and without leaving any state; ``model.extract(a)`` copies the slice out
into a model of its own with the same outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels import Routing
from moesaic.search_spaces import Architecture, Backbone, Layer, MoesaicError
from moesaic.supernet.cache import KeyValueCache, LayerCache
from moesaic.supernet.layers import RMSNorm, SelfAttention, SparseFeedForward
from moesaic.supernet.sharing import Sharing, expert_layout


@dataclass(frozen=True)
class Output:
    """``logits`` [B, S, V] and, per layer, where its tokens went (None for a dense layer)."""

    logits: Tensor
    routings: tuple[Routing | None, ...]

    def balance_loss(self) -> Tensor:
        """Mean over the sparse layers of ``Routing.balance_loss``; 1 when all are balanced, 0 without any."""
        losses = [routing.balance_loss() for routing in self.routings if routing is not None]
        return torch.stack(losses).mean() if losses else self.logits.new_zeros(())


class TransformerLayer(nn.Module):
    def __init__(self, width: int, layer: Layer, backbone: Backbone, sharing: Sharing):
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = SelfAttention(width, layer.attention, backbone)
        self.feed_forward_norm = RMSNorm(width)
        self.feed_forward = SparseFeedForward(width, layer.feed_forward, backbone, sharing)

    def forward(self, x: Tensor, layer: Layer, cache: LayerCache | None = None) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(self.attention_norm(x), layer.attention, cache)
        out, routing = self.feed_forward(self.feed_forward_norm(x).flatten(0, 1), layer.feed_forward)
        return x + out.view_as(x), routing


class Transformer(nn.Module):
    """A decoder language model.

    Parameters
    ----------
    architecture : what the weights are sized for, and what runs when a call names no other.
    vocab_size : tokens of the vocabulary, V.
    sharing : which rows of a bank a smaller architecture's experts take.
    """

    def __init__(self, architecture: Architecture, vocab_size: int, sharing: Sharing = "nested"):
        super().__init__()
        stack, self.architecture = architecture.decoder, architecture
        self.sharing: Sharing = sharing
        self.embedding = nn.Embedding(vocab_size, stack.width)
        self.layers = nn.ModuleList(
            TransformerLayer(stack.width, layer, architecture.backbone, sharing) for layer in stack.layers
        )
        self.norm = RMSNorm(stack.width)
        self._initialise()

    def _initialise(self) -> None:
        """Weights that read from the residual stream start at Normal(0, 1 / sqrt(D)), so that heads and neurons tell
        tokens apart at once; those that write to it at a tenth of the embedding's 0.02, smaller by sqrt(2 L), so that
        they do not drown it. With 0.02 everywhere (GPT-2), sized for wide models, narrow ones stay on a plateau for
        as long as chance has it."""
        residual = 0.002 / (2 * len(self.layers)) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() != 2:
                continue
            if name.endswith((".o", ".down")):
                std = residual
            elif name.endswith((".q", ".k", ".v", ".up", ".gate")):
                std = parameter.shape[1] ** -0.5
            else:
                std = 0.02
            nn.init.normal_(parameter, std=std)

    @property
    def vocab_size(self) -> int:
        return self.embedding.num_embeddings

    def forward(self, tokens: Tensor, architecture: Architecture | None = None) -> Tensor:
        """Logits [B, S, V] of token ids [B, S], computed with the slice ``architecture`` (by default, all of it)."""
        return self.run(tokens, architecture).logits

    def run(
        self, tokens: Tensor, architecture: Architecture | None = None, cache: KeyValueCache | None = None
    ) -> Output:
        """``forward`` that also tells where the tokens were routed.

        With ``cache``, the tokens come after those it holds and are added to it.

        Raises
        ------
        MoesaicError : the architecture does not fit into this model, or the tokens not into the cache.
        """
        architecture = self.architecture if architecture is None else architecture
        if architecture is not self.architecture:
            self._check_fits(architecture)
        if cache is not None:
            cache.check(tokens, architecture)
        stack = architecture.decoder
        weight = self.embedding.weight[:, : stack.width]
        x = F.embedding(tokens, weight)
        routings = []
        for index, (module, layer) in enumerate(zip(self.layers, stack.layers, strict=False)):
            x, routing = module(x, layer, None if cache is None else cache.layer(index))
            routings.append(routing)
        if cache is not None:
            cache.length += tokens.shape[1]
        return Output(F.linear(self.norm(x), weight), tuple(routings))

    @torch.no_grad()
    def extract(self, architecture: Architecture) -> Transformer:
        """A model of its own with a copy of the slice's weights.

        Raises
        ------
        MoesaicError : the architecture does not fit into this model.
        """
        self._check_fits(architecture)
        sources = self.slices(architecture)
        with torch.device("meta"):  # initial weights would only be thrown away, and draw from the global generator
            extracted = Transformer(architecture, self.vocab_size, self.sharing)
        weight = self.embedding.weight
        extracted = extracted.to(weight.dtype).to_empty(device=weight.device)
        for name, parameter in extracted.named_parameters():
            parameter.copy_(sources[name])
        return extracted

    def slices(self, architecture: Architecture) -> dict[str, Tensor]:
        """The slice's weights by parameter name, each as it would stand in a model of its own."""
        stack, head_size = architecture.decoder, architecture.backbone.head_size
        width = stack.width
        found = {"embedding.weight": self.embedding.weight[:, :width], "norm.weight": self.norm.weight[:width]}
        for index, (module, layer) in enumerate(zip(self.layers, stack.layers, strict=False)):
            assert isinstance(module, TransformerLayer)
            attention, part = layer.attention, layer.feed_forward
            bank = module.feed_forward
            layout = expert_layout(bank.part, part, self.sharing)
            rows = torch.cat(
                [torch.arange(start, start + size) for start, size in ((0, part.shared_size), *layout.segments)]
            )
            q_rows, kv_rows = attention.heads * head_size, attention.kv_heads * head_size
            weights = {
                "attention_norm.weight": module.attention_norm.weight[:width],
                "attention.q": module.attention.q[:q_rows, :width],
                "attention.k": module.attention.k[:kv_rows, :width],
                "attention.v": module.attention.v[:kv_rows, :width],
                "attention.o": module.attention.o[:width, :q_rows],
                "feed_forward_norm.weight": module.feed_forward_norm.weight[:width],
                "feed_forward.up": bank.up[rows, :width],
                "feed_forward.down": bank.down[rows, :width],
            }
            if bank.gate is not None:
                weights["feed_forward.gate"] = bank.gate[rows, :width]
            if bank.router is not None and part.router is not None:
                weights["feed_forward.router"] = bank.router[: part.experts, :width]
            found.update({f"layers.{index}.{name}": weight for name, weight in weights.items()})
        return found

    def _check_fits(self, architecture: Architecture) -> None:
        """Raises MoesaicError unless ``architecture`` is a slice of this model."""
        try:
            self._compare(architecture)
        except ValueError as error:
            raise MoesaicError(f"architecture {architecture.fingerprint} does not fit this model: {error}") from None

    def _compare(self, architecture: Architecture) -> None:
        mine, other = self.architecture.decoder, architecture.decoder
        if architecture.backbone != self.architecture.backbone:
            raise ValueError(f"backbone {architecture.backbone} is not {self.architecture.backbone}")
        if other.width > mine.width or len(other.layers) > len(mine.layers):
            raise ValueError(f"width {other.width} x {len(other.layers)} layers > {mine.width} x {len(mine.layers)}")
        for have, want in zip(mine.layers, other.layers, strict=False):
            if want.attention.heads > have.attention.heads or want.attention.kv_heads > have.attention.kv_heads:
                raise ValueError(f"{want.attention} exceeds {have.attention}")
            expert_layout(have.feed_forward, want.feed_forward, self.sharing)
