"""Routing on Triton kernels: the same ``Routing`` as ``kernels.routing.route``, without host synchronisation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.gpu import routing_kernels as routing_device
from moesaic.kernels.gpu.tuning import cdiv, next_power_of_2
from moesaic.kernels.layout import Routing

device: Any = routing_device  # Any, because type checkers expect constexpr where a launch passes plain values

MAX_EXPERTS = 1024
_ELEMENTS = 2048
"""Values of a [tokens, experts] block that a program holds at once."""


def route(logits: Tensor, *, max_experts: int, threshold: float | None = None, normalise: bool = True) -> Routing:
    """See ``kernels.routing.route``. Only the device knows how many pairs a threshold keeps, so the lists have room
    for ``max_experts`` per token; the first ``offsets[-1]`` entries are filled."""
    probabilities, tokens, offsets, weights, slots, token_offsets, _ = _route(
        logits.contiguous(), max_experts, math.inf if threshold is None else threshold, normalise
    )
    return Routing(tokens, offsets, weights, probabilities, slots, token_offsets)


def _blocks(tokens: int, experts: int) -> tuple[int, int, int]:
    """Experts rounded up to a power of two, tokens per block, tokens per program."""
    padded = max(2, next_power_of_2(experts))
    block = max(2, _ELEMENTS // padded)
    chunk = cdiv(cdiv(tokens, routing_device.CHUNKS), block) * block
    return padded, block, max(block, chunk)


@torch.library.custom_op("moesaic::route", mutates_args=())
def _route(
    logits: Tensor, max_experts: int, threshold: float, normalise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """probabilities [T, E], tokens [P], offsets [E + 1], weights [P], slots [P], token_offsets [T + 1], and the index
    of each (token, expert) pair [T, E], -1 where there is none; P = T * max_experts."""
    (tokens, experts), like = logits.shape, logits.new_empty
    max_experts = min(max_experts, experts)
    probabilities = like(tokens, experts, dtype=torch.float32)
    position = like(tokens, experts, dtype=torch.int32)
    pair_tokens = like(tokens * max_experts, dtype=torch.int64)
    weights, slots = like(tokens * max_experts, dtype=torch.float32), like(tokens * max_experts, dtype=torch.int32)
    offsets, token_offsets = like(experts + 1, dtype=torch.int64), like(tokens + 1, dtype=torch.int32)
    if tokens:
        padded, block, chunk = _blocks(tokens, experts)
        chunks = cdiv(tokens, chunk)
        counts = like(chunks, padded, dtype=torch.int32)
        shape = {"EP": padded, "BT": block}
        device.choose[(chunks,)](
            logits, probabilities, position, counts, tokens, experts, chunk, experts, max_experts, threshold, **shape
        )
        device.place[(chunks,)](
            probabilities, position, counts, pair_tokens, offsets, weights, slots, token_offsets,
            tokens, experts, chunk, chunks, NORMALISE=normalise, BC=max(2, _ELEMENTS // padded), **shape,
        )  # fmt: skip
    else:
        offsets.zero_()
        token_offsets.zero_()
    return probabilities, pair_tokens, offsets, weights, slots, token_offsets, position


@_route.register_fake
def _(logits, max_experts, threshold, normalise):
    (tokens, experts), like = logits.shape, logits.new_empty
    pairs = tokens * min(max_experts, experts)
    return (
        like(tokens, experts, dtype=torch.float32),
        like(pairs, dtype=torch.int64),
        like(experts + 1, dtype=torch.int64),
        like(pairs, dtype=torch.float32),
        like(pairs, dtype=torch.int32),
        like(tokens + 1, dtype=torch.int32),
        like(tokens, experts, dtype=torch.int32),
    )


@torch.library.custom_op("moesaic::route_backward", mutates_args=())
def _backward(
    probabilities: Tensor,
    position: Tensor,
    grad_weights: Tensor,
    grad_probabilities: Tensor | None,
    normalise: bool,
    dtype: torch.dtype,
) -> Tensor:
    grad = torch.empty_like(probabilities, dtype=dtype)
    tokens, experts = probabilities.shape
    if tokens:
        padded, block, _ = _blocks(tokens, experts)
        device.backward[(cdiv(tokens, block),)](
            probabilities, position, grad_weights, grad_probabilities, grad, tokens, experts,
            NORMALISE=normalise, BALANCE=grad_probabilities is not None, EP=padded, BT=block,
        )  # fmt: skip
    return grad


@_backward.register_fake
def _(probabilities, position, grad_weights, grad_probabilities, normalise, dtype):
    return torch.empty_like(probabilities, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, ctx.normalise = inputs
    probabilities, tokens, offsets, weights, slots, token_offsets, position = output
    ctx.mark_non_differentiable(tokens, offsets, slots, token_offsets, position)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(probabilities, position)
    ctx.dtype, ctx.pairs = logits.dtype, len(weights)


def _differentiate(
    ctx: Any, grad_probabilities: Tensor | None, _tokens: None, _offsets: None, grad_weights: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    probabilities, position = ctx.saved_tensors
    grad_weights = probabilities.new_zeros(ctx.pairs) if grad_weights is None else grad_weights.contiguous()
    if grad_probabilities is not None:
        grad_probabilities = grad_probabilities.contiguous()
    grad = _backward(probabilities, position, grad_weights, grad_probabilities, ctx.normalise, ctx.dtype)
    return grad, None, None, None


_route.register_autograd(_differentiate, setup_context=_save)
