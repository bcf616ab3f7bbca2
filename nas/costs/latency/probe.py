"""What is timed: one forward pass of a model in a context, and models with random weights for calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moesaic.nas.context import Context
from moesaic.nas.costs.use import LayerUse, counted_use, dense_use
from moesaic.nas.device import Device
from moesaic.search_spaces import Architecture
from moesaic.supernet import KeyValueCache, Transformer
from moesaic.supernet.model import Output
from moesaic.supernet.weights import torch_seed


class Pass:
    """One forward pass of ``model``: over tokens [B, S], or, in a context that decodes, over [B, 1] after a cache of S.

    ``tokens`` [B, S + 1] are ids; the last ones are the input of a decoding step. Each call computes the pass again; a
    step writes to the same place in the cache each time. ``cache`` [n] is memory filled with keys and values to
    attend to; without it, those of the tokens are computed.
    """

    def __init__(
        self, model: Transformer, tokens: Tensor, context: Context, device: Device, cache: Tensor | None = None
    ):
        self.model, self.context, self.device = model.eval(), context, device
        tokens = tokens.to(device.torch_device)
        self.tokens, self.cache = tokens[:, :-1], None
        if context.phase == "decode":
            capacity, dtype = context.sequence_length + 1, _cache_type(device)
            self.cache = KeyValueCache(
                model.architecture, len(tokens), capacity, device.torch_device, dtype, buffer=cache
            )
            if cache is None:
                with torch.inference_mode(), device.autocast():
                    model.states(self.tokens, cache=self.cache)
            self.tokens = tokens[:, -1:]

    def __call__(self) -> Output:
        with torch.inference_mode(), self.device.autocast():
            return self.plain()

    def plain(self) -> Output:
        """The pass in the type and the mode of the caller."""
        if self.cache is not None:
            self.cache.length = self.context.sequence_length
        return self.model.run(self.tokens, cache=self.cache)

    def uses(self) -> list[LayerUse]:
        """How much of each layer the tokens of this pass use."""
        layers = self.model.architecture.layers.items()
        return [
            dense_use(layer.feed_forward)
            if routing is None
            else counted_use(layer.feed_forward, routing.load.tolist(), self.context.extent(slot.stack))
            for (slot, layer), routing in zip(layers, self().routings, strict=True)
        ]


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
        models = [Transformer(a, size) for a, size in zip(architectures, vocab_sizes, strict=True)]
    largest = max(sum(parameter.numel() for parameter in model.parameters()) for model in models)
    buffer = torch.empty(largest).normal_(0, 0.02, generator=generator).to(device.torch_device)
    shape = (context.batch_size, context.sequence_length + 1)
    tokens = torch.randint(0, context.vocab_size, shape, generator=generator)
    cache = None
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
        passes.append(Pass(model, tokens % model.vocab_size, own, device, cache))
    return passes


def _cache_type(device: Device) -> torch.dtype:
    return torch.bfloat16 if device.bfloat16 else torch.float32


def text_tokens(tokens: Tensor, context: Context) -> Tensor:
    """[B, S + 1] of ``tokens`` [any], repeated where there are too few."""
    needed = context.batch_size * (context.sequence_length + 1)
    flat = tokens.flatten()
    return flat.repeat(-(-needed // len(flat)))[:needed].view(context.batch_size, -1)
