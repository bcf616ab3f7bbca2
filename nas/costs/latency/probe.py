"""What is timed: one pass of a model in a context, and models with random weights for calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels import Routing
from moesaic.nas.context import Context
from moesaic.nas.costs.use import LayerUse, counted_use, dense_use
from moesaic.nas.device import Device
from moesaic.search_spaces import Architecture, FeedForward, Slot
from moesaic.supernet import Batch, KeyValueCache, Transformer, beam_search
from moesaic.supernet.model import Output
from moesaic.supernet.weights import torch_seed


class Pass:
    """One pass of ``model``: over tokens [B, S]; in a context that decodes, over [B, 1] after a cache of S; in one that
    translates, a beam search for S tokens of each source.

    ``tokens`` [B, S + 1] are ids; the last ones are the input of a decoding step. ``source`` [B, P] is what an encoder
    reads. Each call computes the pass again; a decoding step writes to the same place in the cache each time. ``cache``
    [n] is memory filled with keys and values to attend to; without it, those of the tokens are computed.
    """

    def __init__(
        self,
        model: Transformer,
        tokens: Tensor,
        context: Context,
        device: Device,
        cache: Tensor | None = None,
        source: Tensor | None = None,
    ):
        self.model, self.context, self.device = model.eval(), context, device
        tokens = tokens.to(device.torch_device)
        self.tokens, self.cache = tokens[:, :-1], None
        self.source = None if source is None else source.to(device.torch_device)
        if context.phase == "decode":
            capacity, dtype = context.sequence_length + 1, _cache_type(device)
            self.cache = KeyValueCache(
                model.architecture, len(tokens), capacity, device.torch_device, dtype, buffer=cache
            )
            if cache is None:
                with torch.inference_mode(), device.autocast():
                    model.states(self.tokens, cache=self.cache)
            self.tokens = tokens[:, -1:]

    def __call__(self) -> None:
        with torch.inference_mode(), self.device.autocast():
            if self.context.phase == "translate":
                self._translate()
            else:
                self.plain()

    def _translate(self) -> None:
        """Exactly as many tokens as the context says, the last of which is the end, so that a time is that of a
        length."""
        assert self.source is not None
        words = self.context.sequence_length - 1
        beam_search(self.model, self.source, start=0, end=1, beam=self.context.beam, min_length=words, max_length=words)

    def plain(self) -> Output:
        """A pass that does not translate, in the type and the mode of the caller."""
        if self.cache is not None:
            self.cache.length = self.context.sequence_length
        return self.model.run(self.tokens, cache=self.cache, source=self.source)

    @property
    def kept(self) -> list[Tensor]:
        """What is there before the pass: inputs, weights and cache."""
        inputs = [self.tokens] if self.source is None else [self.tokens, self.source]
        return [*inputs, *self.model.parameters(), *([] if self.cache is None else self.cache.tensors)]

    def uses(self) -> list[LayerUse]:
        """How much of each layer the tokens of this pass use; of a translation, a mean over its steps."""
        routings: list[list[Routing | None]] = []
        hooks = []
        for module in self.model.layers:
            own: list[Routing | None] = []
            routings.append(own)
            hooks.append(module.register_forward_hook(partial(_routing_into, own)))
        try:
            self()
        finally:
            for hook in hooks:
                hook.remove()
        layers = zip(self.model.architecture.layers.items(), routings, strict=True)
        return [self._mean_use(slot, layer.feed_forward, own) for (slot, layer), own in layers]

    def _mean_use(self, slot: Slot, part: FeedForward, routings: Sequence[Routing | None]) -> LayerUse:
        extent = self.context.extent(slot.stack)
        uses = [
            dense_use(part) if routing is None else counted_use(part, routing.load.tolist(), extent)
            for routing in routings
        ]
        return LayerUse(*(sum(values) / len(uses) for values in zip(*map(astuple, uses), strict=True)))


def _routing_into(routings: list[Routing | None], _: Any, __: Any, output: tuple[Tensor, Routing | None]) -> None:
    routings.append(output[1])


def random_passes(
    architectures: Sequence[Architecture],
    context: Context,
    device: Device,
    seed: int,
    vocab_sizes: Sequence[int] | None = None,
) -> list[Pass]:
    """A pass for each architecture, over random tokens, with random weights from ``seed``.

    All models are views of one buffer as large as the largest model, and their key/value caches of another, so many
    fit in the memory of one. Router weights have a large enough scale to tell tokens apart, so that a threshold keeps
    about as many experts as when trained. ``vocab_sizes`` are those of the models, where they are not the context's.
    """
    generator = torch.Generator().manual_seed(torch_seed(seed))
    vocab_sizes = vocab_sizes or [context.vocab_size] * len(architectures)
    with torch.device("meta"):
        models = [
            Transformer(a, size, source_vocab_size=context.source_vocab_size)
            for a, size in zip(architectures, vocab_sizes, strict=True)
        ]
    largest = max(sum(parameter.numel() for parameter in model.parameters()) for model in models)
    buffer = torch.empty(largest).normal_(0, 0.02, generator=generator).to(device.torch_device)
    shape = (context.batch_size, context.sequence_length + 1)
    tokens = torch.randint(0, context.vocab_size, shape, generator=generator)
    cache, source = None, None
    if context.source_length:
        read = (context.batch_size, context.source_length)
        source = torch.randint(0, context.source_vocab_size or context.vocab_size, read, generator=generator)
    if context.phase == "decode":
        values = max(KeyValueCache.size(architecture, *shape) for architecture in architectures)
        cache = torch.empty(values, dtype=_cache_type(device)).normal_(generator=generator).to(device.torch_device)
    passes = []
    for model in models:
        weights, used = {}, 0
        for name, parameter in model.named_parameters():
            view = buffer[used : used + parameter.numel()].view(parameter.shape)
            used += parameter.numel()
            if parameter.dim() == 1:
                view = torch.zeros_like(view) if name.endswith("bias") else torch.ones_like(view)
            elif name.endswith("router"):
                view = view * (100 / parameter.shape[1] ** 0.5)  # standard deviation 2 / sqrt(D)
            weights[name] = view
        model.load_state_dict(weights, assign=True)
        own = replace(context, vocab_size=model.vocab_size)
        read = None if source is None else source % (model.source_vocab_size or model.vocab_size)
        passes.append(Pass(model, tokens % model.vocab_size, own, device, cache, read))
    return passes


def _cache_type(device: Device) -> torch.dtype:
    return torch.bfloat16 if device.bfloat16 else torch.float32


def text_pass(model: Transformer, batch: Batch, context: Context, device: Device) -> Pass:
    """A pass over the text of ``batch``, repeated where there is too little."""
    tokens = _text(batch.tokens, batch.mask, context.batch_size, context.sequence_length + 1)
    source = None
    if batch.source is not None:
        source = _text(batch.source, batch.source_mask, context.batch_size, context.source_length)
    return Pass(model, tokens, context, device, source=source)


def _text(tokens: Tensor, mask: Tensor | None, rows: int, length: int) -> Tensor:
    """[rows, length] of ``tokens`` [B, S] without padding."""
    flat = tokens.flatten() if mask is None else tokens[mask]
    return flat.repeat(-(-rows * length // len(flat)))[: rows * length].view(rows, length)
