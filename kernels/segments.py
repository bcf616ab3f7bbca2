"""The sparse layer as one product per expert over sorted segments of pairs, with a backward of its own.

Autograd over a slice of the bank per expert would fill a zero gradient as large as the bank for each of them
(measured up to 36 times the cost of a dense layer at 32 experts); here every expert's gradient is written
straight into its rows of one buffer. The hidden layer is kept for the backward pass, the gathered input is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kernels.layout import Bank, ExpertLayout, Routing
from kernels.reference import activate


def sparse_ffn(x: Tensor, bank: Bank, layout: ExpertLayout, routing: Routing | None, activation: str) -> Tensor:
    """See ``kernels.sparse_ffn``."""
    if routing is None and len(layout.sizes) != 1:
        raise ValueError("without a routing there is one expert, which every token uses")
    weights, tokens = (None, None) if routing is None else (routing.weights, routing.tokens)
    bounds = [0, len(x)] if routing is None else routing.offsets.tolist()
    # Inside a Function gradients are always off: only here can it be known whether a backward pass will come.
    keep_hidden = torch.is_grad_enabled()
    return _SegmentedFFN.apply(
        x, bank.up, bank.gate, bank.down, weights, tokens, bounds, layout, activation, keep_hidden
    )


class _SegmentedFFN(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor,
        gate: Tensor | None,
        down: Tensor,
        weights: Tensor | None,
        tokens: Tensor | None,
        bounds: list[int],
        layout: ExpertLayout,
        activation: str,
        keep_hidden: bool,
    ) -> Tensor:
        inputs = x if tokens is None else x[tokens]  # [P, D]
        outputs = torch.empty_like(inputs)
        pre: list[Tensor | None] = []  # pre-activations per expert: up, gate
        for (start, size), first, last in _segments(layout, bounds):
            w_up, w_gate, w_down = _expert_weights(up, gate, down, start, size, x)
            a = inputs[first:last] @ w_up.T
            g = None if w_gate is None else inputs[first:last] @ w_gate.T
            torch.mm(activate(a, g, activation), w_down, out=outputs[first:last])
            if keep_hidden:
                pre += [a, g]
        ctx.save_for_backward(x, up, gate, down, weights, tokens, outputs if weights is not None else None, *pre)
        ctx.bounds, ctx.layout, ctx.activation = bounds, layout, activation
        if tokens is None or weights is None:
            return outputs
        return torch.zeros_like(x).index_add_(0, tokens, outputs * weights[:, None].to(x.dtype))

    @staticmethod
    @once_differentiable  # the saved hidden layer carries no graph: a second derivative would be wrong in silence
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, up, gate, down, weights, tokens, outputs, *pre = ctx.saved_tensors
        width = x.shape[1]
        inputs = x if tokens is None else x[tokens]
        grad_weights = None
        if tokens is None:
            grad_out = grad
        else:
            grad_pairs = grad[tokens]
            grad_weights = (grad_pairs * outputs).sum(-1).to(weights.dtype)
            grad_out = grad_pairs * weights[:, None].to(x.dtype)
        grad_inputs = torch.zeros_like(inputs)
        grad_up, grad_down = torch.zeros_like(up), torch.zeros_like(down)
        grad_gate = None if gate is None else torch.zeros_like(gate)
        for i, ((start, size), first, last) in enumerate(_segments(ctx.layout, ctx.bounds)):
            rows, pairs = slice(start, start + size), slice(first, last)
            w_up, w_gate, w_down = _expert_weights(up, gate, down, start, size, x)
            a, g = pre[2 * i], pre[2 * i + 1]
            grad_hidden = grad_out[pairs] @ w_down.T
            hidden, grad_a, grad_g = _hidden_backward(a, g, grad_hidden, ctx.activation)
            grad_down[rows, :width] = hidden.T @ grad_out[pairs]
            grad_up[rows, :width] = grad_a.T @ inputs[pairs]
            grad_inputs[pairs] = grad_a @ w_up
            if grad_gate is not None and w_gate is not None and grad_g is not None:
                grad_gate[rows, :width] = grad_g.T @ inputs[pairs]
                grad_inputs[pairs] += grad_g @ w_gate
        grad_x = grad_inputs if tokens is None else torch.zeros_like(x).index_add_(0, tokens, grad_inputs)
        return grad_x, grad_up, grad_gate, grad_down, grad_weights, None, None, None, None, None


def _segments(layout: ExpertLayout, bounds: list[int]):
    """((start, size), first pair, last pair) of every expert that has pairs."""
    return [
        (segment, first, last)
        for segment, first, last in zip(layout.segments, bounds[:-1], bounds[1:], strict=True)
        if last > first
    ]


def _expert_weights(
    up: Tensor, gate: Tensor | None, down: Tensor, start: int, size: int, x: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Views of one expert's rows and the first D columns, in the dtype of ``x`` (a copy only where that differs)."""
    rows, columns = slice(start, start + size), slice(0, x.shape[1])
    w_gate = None if gate is None else gate[rows, columns].to(x.dtype)
    return up[rows, columns].to(x.dtype), w_gate, down[rows, columns].to(x.dtype)


def _hidden_backward(
    a: Tensor, g: Tensor | None, grad: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden values again (cheaper to compute than to store) and the gradients of ``a`` and ``g``."""
    if g is not None:
        silu = torch.nn.functional.silu(g)
        return silu * a, grad * silu, torch.ops.aten.silu_backward(grad * a, g)
    if activation == "relu":
        return a.relu(), torch.ops.aten.threshold_backward(grad, a, 0), None
    return torch.nn.functional.gelu(a), torch.ops.aten.gelu_backward(grad, a), None
