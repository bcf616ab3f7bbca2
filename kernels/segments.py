"""The sparse layer as one product per expert over sorted segments of pairs, with a backward of its own.

Autograd over a slice of the bank per expert would fill a zero gradient as large as the bank for each of them
(measured up to 36 times the cost of a dense layer at 32 experts). Here every expert's gradient is written directly
into its rows of one buffer. The remaining overhead is first use of memory (on Linux about four times as slow as
memory in use) and the start of operations. So pairs are gathered, weighted and added in blocks of experts through
one buffer that stays in the cache, outputs overwrite inputs, and only the hidden layer is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moesaic.kernels.activations import ACTIVATIONS, Activation
from moesaic.kernels.layout import Bank, ExpertLayout, Routing

# 4 MiB of float32. Never slower than one block per expert, 1 MiB blocks or a single block; 15 % faster than one per
# expert if experts are small, 10 % faster than a single block if the pairs take 32 MiB.
BLOCK_ELEMENTS = 2**20

Expert = tuple[slice, slice]  # rows of the bank, rows of its block's pairs


def sparse_ffn(x: Tensor, bank: Bank, layout: ExpertLayout, routing: Routing | None, activation: str) -> Tensor:
    """See ``kernels.sparse_ffn``."""
    if routing is None and len(layout.sizes) != 1:
        raise ValueError("without a routing there is one expert, which every token uses")
    weights, tokens = (None, None) if routing is None else (routing.weights, routing.tokens)
    bounds = [0, len(x)] if routing is None else routing.offsets.tolist()
    blocks = _blocks(layout, bounds, len(x) if routing is None else BLOCK_ELEMENTS // max(1, x.shape[1]))
    # Inside a Function gradients are always off, so whether a backward pass may follow is determined here.
    keep_hidden = torch.is_grad_enabled()
    return _SegmentedFFN.apply(
        x, bank.up, bank.up_bias, bank.gate, bank.down, weights, tokens, blocks, ACTIVATIONS[activation], keep_hidden
    )


class _SegmentedFFN(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        gate: Tensor | None,
        down: Tensor,
        weights: Tensor | None,
        tokens: Tensor | None,
        blocks: list[tuple[slice, list[Expert]]],
        activation: Activation,
        keep_hidden: bool,
    ) -> Tensor:
        out = x.new_empty(x.shape) if tokens is None else x.new_zeros(x.shape)
        scale = None if weights is None else weights.to(x.dtype)[:, None]
        buffer = _buffer(x, tokens, blocks)
        kept: list[Tensor | None] = []  # per expert: pre-activations of up (or hidden values instead) and of gate
        for pairs, experts in blocks:
            inputs = x if tokens is None else _gather(x, tokens[pairs], buffer)
            outputs = out if tokens is None else inputs  # an expert's inputs are not needed after its outputs
            for rows, own in experts:
                w_up, w_gate, w_down = _expert_weights(up, gate, down, rows, x)
                a = _up_product(inputs[own], w_up, up_bias, rows)
                g = None if w_gate is None else torch.mm(inputs[own], w_gate.T)
                torch.mm(hidden_values(a, g, activation), w_down, out=outputs[own])
                if keep_hidden:
                    kept += [a, g]
            if tokens is not None and scale is not None:
                out.index_add_(0, tokens[pairs], outputs.mul_(scale[pairs]))
        ctx.save_for_backward(x, up, up_bias, gate, down, weights, tokens, *kept)
        ctx.blocks, ctx.activation = blocks, activation
        return out

    @staticmethod
    @once_differentiable  # the saved hidden layer has no graph: a second derivative would be silently wrong
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, up, up_bias, gate, down, weights, tokens, *kept = ctx.saved_tensors
        width, written = x.shape[1], [rows for _, experts in ctx.blocks for rows, _ in experts]
        grad_up, grad_down = _bank_gradient(up, written, width), _bank_gradient(down, written, width)
        grad_gate = None if gate is None else _bank_gradient(gate, written, width)
        grad_bias = None if up_bias is None else torch.zeros_like(up_bias)
        grad_x = x.new_empty(x.shape) if tokens is None else x.new_zeros(x.shape)
        grad_weights = None if weights is None else weights.new_zeros(weights.shape)
        scale = None if weights is None else weights.to(x.dtype)[:, None]
        input_buffer, grad_buffer = _buffer(x, tokens, ctx.blocks), _buffer(x, tokens, ctx.blocks)
        saved = iter(kept)
        for pairs, experts in ctx.blocks:
            inputs = x if tokens is None else _gather(x, tokens[pairs], input_buffer)
            grad_out = grad if tokens is None else _gather(grad, tokens[pairs], grad_buffer)
            grad_inputs = grad_x if tokens is None else inputs  # as in forward
            block_scale = None if scale is None else scale[pairs]
            for rows, own in experts:
                w_up, w_gate, w_down = _expert_weights(up, gate, down, rows, x)
                a, g = next(saved), next(saved)
                hidden = a if ctx.activation.keeps_hidden else hidden_values(a, g, ctx.activation)
                grad_hidden = torch.mm(grad_out[own], w_down.T)
                if grad_weights is not None and block_scale is not None:
                    # d(out)/d(weight) is the expert's output, but <grad, hidden @ w_down> = <grad @ w_down.T, hidden>,
                    # so outputs need not be kept.
                    grad_weights[pairs][own] = (grad_hidden * hidden).sum(-1)
                    grad_hidden.mul_(block_scale[own])
                    grad_out[own].mul_(block_scale[own])
                _multiply_into(grad_down[rows, :width], hidden.T, grad_out[own])
                grad_a, grad_g = _hidden_backward(a, g, grad_hidden, ctx.activation)
                _multiply_into(grad_up[rows, :width], grad_a.T, inputs[own])
                if grad_bias is not None:
                    torch.sum(grad_a, 0, dtype=grad_bias.dtype, out=grad_bias[rows])
                if grad_gate is not None and grad_g is not None:
                    _multiply_into(grad_gate[rows, :width], grad_g.T, inputs[own])
                torch.mm(grad_a, w_up, out=grad_inputs[own])
                if w_gate is not None and grad_g is not None:
                    grad_inputs[own].addmm_(grad_g, w_gate)
            if tokens is not None:
                grad_x.index_add_(0, tokens[pairs], grad_inputs)
        return grad_x, grad_up, grad_bias, grad_gate, grad_down, grad_weights, None, None, None, None


def _blocks(layout: ExpertLayout, bounds: list[int], longest: int) -> list[tuple[slice, list[Expert]]]:
    """Pairs of each block and its experts, without those that have no pairs.

    A block is as many whole experts as have at most ``longest`` pairs together, at least one.
    """
    blocks: list[tuple[slice, list[Expert]]] = []
    for (start, size), first, last in zip(layout.segments, bounds[:-1], bounds[1:], strict=True):
        if last > first:
            if not blocks or last - blocks[-1][0].start > longest:
                blocks.append((slice(first, last), []))
            begin, experts = blocks[-1][0].start, blocks[-1][1]
            experts.append((slice(start, start + size), slice(first - begin, last - begin)))
            blocks[-1] = slice(begin, last), experts
    return blocks


def _buffer(x: Tensor, tokens: Tensor | None, blocks: list[tuple[slice, list[Expert]]]) -> Tensor:
    """Room for the pairs of any block; empty if ``tokens`` is None, since x is then used in place."""
    longest = max((pairs.stop - pairs.start for pairs, _ in blocks), default=0)
    return x.new_empty(0 if tokens is None else longest, x.shape[1])


def _gather(source: Tensor, tokens: Tensor, buffer: Tensor) -> Tensor:
    """``source[tokens]`` at the start of ``buffer``; ``index_select`` takes a fifth of the time of indexing."""
    return torch.index_select(source, 0, tokens, out=buffer[: len(tokens)])


def _expert_weights(
    up: Tensor, gate: Tensor | None, down: Tensor, rows: slice, x: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Views of one expert's rows and the first D columns, in the dtype of ``x`` (a copy only where that differs)."""
    columns = slice(0, x.shape[1])
    w_gate = None if gate is None else gate[rows, columns].to(x.dtype)
    return up[rows, columns].to(x.dtype), w_gate, down[rows, columns].to(x.dtype)


def _up_product(inputs: Tensor, w_up: Tensor, up_bias: Tensor | None, rows: slice) -> Tensor:
    """Pre-activations of ``up``. ``addmm`` adds the bias inside the product, which is cheaper than a separate pass."""
    if up_bias is None:
        return torch.mm(inputs, w_up.T)
    return torch.addmm(up_bias[rows].to(inputs.dtype), inputs, w_up.T)


def _multiply_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out = left @ right``; the bank and its gradient may have another dtype than the hidden states."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _bank_gradient(matrix: Tensor, written: list[slice], width: int) -> Tensor:
    """A gradient of ``matrix`` that is zero except in the first ``width`` columns of the rows about to be written."""
    gradient = torch.empty_like(matrix)
    end = 0
    for rows in [*sorted(written, key=lambda rows: rows.start), slice(len(matrix), len(matrix))]:
        if rows.start > end:
            gradient[end : rows.start] = 0
        end = rows.stop
    if width < matrix.shape[1]:
        gradient[:, width:] = 0
    return gradient


def hidden_values(a: Tensor, g: Tensor | None, activation: Activation) -> Tensor:
    """Hidden values; they overwrite ``a`` if the activation ``keeps_hidden``."""
    pointwise = activation.pointwise
    if g is not None:
        return pointwise.forward(g).mul_(a)
    return (pointwise.forward_in_place or pointwise.forward)(a)


def _hidden_backward(a: Tensor, g: Tensor | None, grad: Tensor, activation: Activation) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``a`` and ``g``. ``grad`` is overwritten."""
    pointwise = activation.pointwise
    if g is None:
        return pointwise.backward(grad, a), None
    grad_g = pointwise.backward(grad * a, g)
    return grad.mul_(pointwise.forward(g)), grad_g
