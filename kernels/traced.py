"""The torch implementation as one operator, for programs that trace a model: torch.compile and torch.export.

How many pairs an expert has is known only when the model runs, so its products cannot be traced one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.kernels import segments
from moesaic.kernels.layout import Bank, ExpertLayout, Routing
from moesaic.kernels.reference import activate


def sparse_ffn(x: Tensor, bank: Bank, layout: ExpertLayout, routing: Routing | None, activation: str) -> Tensor:
    """See ``kernels.sparse_ffn``."""
    if routing is None:
        return _dense(x, bank, layout, activation)
    tensors = (x, bank.up, bank.gate, bank.down, bank.up_bias, routing.weights, routing.tokens, routing.offsets)
    return _forward(*tensors, list(layout.starts), list(layout.sizes), activation)


def _dense(x: Tensor, bank: Bank, layout: ExpertLayout, activation: str) -> Tensor:
    """Plain products, which the program may fuse."""
    rows, columns = slice(layout.starts[0], layout.starts[0] + layout.sizes[0]), slice(0, x.shape[1])
    gate = None if bank.gate is None else x @ bank.gate[rows, columns].to(x.dtype).T
    up = x @ bank.up[rows, columns].to(x.dtype).T
    if bank.up_bias is not None:
        up = up + bank.up_bias[rows].to(x.dtype)
    return activate(up, gate, activation) @ bank.down[rows, columns].to(x.dtype)


@torch.library.custom_op("moesaic::segments", mutates_args=())
def _forward(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_bias: Tensor | None,
    weights: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    starts: list[int],
    sizes: list[int],
    activation: str,
) -> Tensor:
    layout = ExpertLayout(tuple(starts), tuple(sizes))
    routing = Routing(tokens, offsets, weights, probabilities=weights)  # segments read no probabilities
    with torch.no_grad():
        return segments.sparse_ffn(x, Bank(up, gate, down, up_bias), layout, routing, activation)


@_forward.register_fake
def _(x, up, gate, down, up_bias, weights, tokens, offsets, starts, sizes, activation):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("moesaic::segments_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_bias: Tensor | None,
    weights: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    starts: list[int],
    sizes: list[int],
    activation: str,
) -> list[Tensor]:
    """Gradients of x, up, gate, down, up_bias and the weights, those that there are; the hidden layer is computed
    again."""
    given = (x, up, gate, down, up_bias, weights)
    layout = ExpertLayout(tuple(starts), tuple(sizes))
    with torch.enable_grad():
        leaves: list[Any] = [None if one is None else one.detach().requires_grad_() for one in given]
        x, *bank, weights = leaves
        routing = Routing(tokens, offsets, weights, probabilities=weights)
        out = segments.sparse_ffn(x, Bank(*bank), layout, routing, activation)
        return list(torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad))


@_backward.register_fake
def _(grad, x, up, gate, down, up_bias, weights, tokens, offsets, starts, sizes, activation):
    return [torch.empty_like(one) for one in (x, up, gate, down, up_bias, weights) if one is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, starts, sizes, activation = inputs
    ctx.save_for_backward(*tensors)
    ctx.layout, ctx.activation = (starts, sizes), activation


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = iter(_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.layout, ctx.activation))
    own = [None if tensor is None else next(gradients) for tensor in ctx.saved_tensors[:6]]
    return *own, *(None,) * 5


_forward.register_autograd(_differentiate, setup_context=_save)
