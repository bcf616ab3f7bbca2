"""Forward and backward of the sparse layer on Triton kernels, registered as custom operators of torch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from moesaic.kernels.gpu import expert_kernels as _device
from moesaic.kernels.gpu.tuning import cdiv, next_power_of_2, precision, row_tile, tune_key, tuned
from moesaic.kernels.layout import Bank, ExpertLayout, Routing

device: Any = _device  # to a type checker a kernel takes constexpr where a launch gives plain values


def sparse_ffn(x: Tensor, bank: Bank, layout: ExpertLayout, routing: Routing, activation: str) -> Tensor:
    """See ``kernels.sparse_ffn``. Never waits for the device when the routing was made there (``slots`` are known)."""
    routing = routing.in_token_order()
    assert routing.slots is not None and routing.token_offsets is not None
    weights = [bank.up, bank.gate, bank.down]
    if len({m.stride() for m in weights if m is not None}) > 1 or bank.up.stride(1) != 1:
        weights = [m if m is None else m.contiguous() for m in weights]
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *weights, routing.weights)
    )
    out, *_ = _forward(
        x if x.stride(1) == 1 else x.contiguous(),
        *weights,
        routing.weights,
        routing.tokens,
        routing.offsets,
        routing.slots,
        routing.token_offsets,
        list(layout.starts),
        list(layout.sizes),
        activation,
        needs_grad,
    )
    return out


class _Call:
    """What the launches of one forward or backward pass have in common."""

    def __init__(self, x: Tensor, bank: Tensor, tokens: Tensor, offsets: Tensor, starts: list[int], sizes: list[int]):
        self.pairs, self.experts, self.width = len(tokens), len(sizes), x.shape[1]
        self.most_columns = max(sizes)
        self.rows = row_tile(self.pairs, self.experts)
        self.offsets = offsets
        self.starts, self.sizes = _on_device(tuple(starts), tuple(sizes), x.device)
        self.tune = tune_key(self.width, self.most_columns, self.pairs)
        self.stride_hidden = _hidden_stride(sizes)
        self.acc = triton.language.float64 if x.dtype == torch.float64 else triton.language.float32
        # A divisor of every expert's size: it tells the compiler how wide loads may be, and where no mask is needed.
        aligned = math.gcd(128, *sizes)
        self.shared = {"D": self.width, "ALIGNED": aligned, "ACC": self.acc, "PRECISION": precision(x.dtype)}
        # Each expert's last row tile may be partly filled: this many exist at most, whatever the routing is.
        self.row_tiles = min(self.pairs, (self.pairs + self.experts * (self.rows - 1)) // self.rows)
        self.tiles = torch.empty(self.row_tiles, dtype=torch.int32, device=x.device)
        device.pack_row_tiles[(self.experts,)](
            self.tiles, offsets, self.experts, self.row_tiles,
            BM=self.rows, EP=next_power_of_2(self.experts), BT=256,
        )  # fmt: skip
        self.stride_weight = bank.stride(0)
        self.value_bytes = max(x.element_size(), bank.element_size())

    def hidden(self, like: Tensor) -> Tensor:
        """A buffer [P, F]. Columns past an expert's size are never touched."""
        return like.new_empty(self.pairs, self.stride_hidden)

    def hidden_grid(self, meta: dict[str, int]) -> tuple[int]:
        return (self.row_tiles * cdiv(self.most_columns, meta["BN"]),)

    def width_grid(self, meta: dict[str, int]) -> tuple[int]:
        return (self.row_tiles * cdiv(self.width, meta["BN"]),)

    def weight_grid(self, meta: dict[str, int]) -> tuple[int]:
        neuron_tiles = cdiv(self.most_columns, meta["BM"])
        return (self.experts * neuron_tiles * cdiv(self.width, meta["BN"]),)

    def hidden_product(
        self, rows: Tensor, tokens: Tensor, up: Tensor, gate: Tensor | None, hidden: Tensor, activation: str,
        pre_up: Tensor | None = None, pre_gate: Tensor | None = None,
    ) -> None:  # fmt: skip
        """hidden [P, F] = activation(rows[tokens] @ up.T), with the pre-activations where there is room for them."""
        tuned(device.hidden_product, f"hidden_{activation}", self.rows, self.value_bytes)[self.hidden_grid](
            rows, tokens, up, gate, hidden, pre_up, pre_gate, self.offsets, self.starts, self.sizes, self.tiles,
            rows.stride(0), self.stride_weight, self.stride_hidden, self.most_columns, self.tune,
            ACTIVATION=activation, KEEP=pre_up is not None, BM=self.rows, **self.shared,
        )  # fmt: skip

    def width_product(
        self, hidden: Tensor, second: Tensor | None, weight: Tensor, second_weight: Tensor | None,
        scale: Tensor | None, slots: Tensor, token_offsets: Tensor, out: Tensor,
    ) -> None:  # fmt: skip
        """out [T, D]: each token's sum of the rows hidden @ weight + second @ second_weight, times scale."""
        rows = out.new_empty(self.pairs, self.width)
        tuned(device.width_product, "width_product", self.rows, self.value_bytes)[self.width_grid](
            hidden, second, weight, second_weight, scale, slots, rows, self.offsets, self.starts, self.sizes,
            self.tiles, self.stride_hidden, self.stride_weight, self.tune,
            TWO=second is not None, SCALED=scale is not None, BM=self.rows, **self.shared,
        )  # fmt: skip
        columns = min(next_power_of_2(self.width), 1024)
        tokens = max(1, 2048 // columns)
        device.combine[(cdiv(len(out), tokens), cdiv(self.width, columns))](
            rows, token_offsets, out, len(out), D=self.width, ACC=self.acc, BT=tokens, BD=columns
        )

    def weight_product(self, left: Tensor, right: Tensor, tokens: Tensor, like: Tensor, covered: bool) -> Tensor:
        """Gradient of the bank's matrix ``like``: left.T @ right[tokens] per expert, written in place."""
        out = (torch.empty_like if covered else torch.zeros_like)(like)
        tuned(device.weight_backward, "weight_backward", self.rows, self.value_bytes)[self.weight_grid](
            left, right, tokens, out, self.offsets, self.starts, self.sizes,
            self.stride_hidden, right.stride(0), out.stride(0), self.most_columns, self.tune, **self.shared,
        )  # fmt: skip
        return out


def _hidden_stride(sizes: list[int]) -> int:
    """Values between two rows of a hidden buffer: the largest expert, rounded up to keep rows aligned."""
    return cdiv(max(sizes), 16) * 16


@lru_cache(maxsize=1024)
def _on_device(starts: tuple[int, ...], sizes: tuple[int, ...], where: torch.device) -> tuple[Tensor, Tensor]:
    """Layout tables on the device: copied there once per layout."""
    with torch.inference_mode(False):
        both = torch.tensor([starts, sizes], dtype=torch.int32, device=where)
    return both[0], both[1]


@torch.library.custom_op("moesaic::sparse_ffn", mutates_args=())
def _forward(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    weights: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    slots: Tensor,
    token_offsets: Tensor,
    starts: list[int],
    sizes: list[int],
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [T, D] and what the backward pass needs: hidden values [P, F] (relu) or pre-activations (the others)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    nothing = x.new_empty(0)
    if not len(tokens):
        return out.zero_(), nothing, nothing.clone(), nothing.clone()
    call = _Call(x, up, tokens, offsets, starts, sizes)
    hidden = call.hidden(x)
    pre_up = call.hidden(x) if keep and activation != "relu" else nothing
    pre_gate = call.hidden(x) if keep and gate is not None else nothing.clone()
    call.hidden_product(x, tokens, up, gate, hidden, activation, pre_up if keep else None, pre_gate)
    call.width_product(hidden, None, down, None, weights, slots, token_offsets, out)
    return out, hidden if keep and activation == "relu" else nothing.clone(), pre_up, pre_gate


@_forward.register_fake
def _(x, up, gate, down, weights, tokens, offsets, slots, token_offsets, starts, sizes, activation, keep):
    stride = _hidden_stride(sizes)

    def buffer(there: bool) -> Tensor:
        return x.new_empty((len(tokens), stride) if there else (0,))

    gated = gate is not None
    return (
        x.new_empty(x.shape),
        buffer(keep and activation == "relu"),
        buffer(keep and activation != "relu"),
        buffer(keep and gated),
    )


@torch.library.custom_op("moesaic::sparse_ffn_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    weights: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    slots: Tensor,
    token_offsets: Tensor,
    hidden: Tensor,
    pre_up: Tensor,
    pre_gate: Tensor,
    starts: list[int],
    sizes: list[int],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, up, gate (empty without one), down, and the pairs' weights."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    # Without unused rows or columns every element of a bank's gradient is written by the kernel.
    covered = sum(sizes) == len(up) and x.shape[1] == up.shape[1]
    if not len(tokens):
        empty = torch.zeros_like(gate) if gate is not None else x.new_empty(0)
        return grad_x.zero_(), torch.zeros_like(up), empty, torch.zeros_like(down), torch.zeros_like(weights)
    call = _Call(x, up, tokens, offsets, starts, sizes)
    grad_pre_up, scaled = call.hidden(x), call.hidden(x)
    grad_pre_gate = call.hidden(x) if gate is not None else None
    # Room for pairs that a threshold did not keep is no pair: its gradient must be 0, not what memory holds.
    grad_weights = torch.zeros_like(weights)
    call.hidden_product(grad, tokens, down, None, grad_pre_up, "none")
    device.activation_backward[(call.row_tiles,)](
        grad_pre_up, hidden, pre_up, pre_gate, weights, grad_pre_gate, scaled, grad_weights,
        offsets, call.sizes, call.tiles, call.stride_hidden,
        ACTIVATION=activation, ALIGNED=call.shared["ALIGNED"], ACC=call.acc, BM=call.rows, BN=4096 // call.rows,
    )  # fmt: skip
    grad_down = call.weight_product(scaled, grad, tokens, down, covered)
    del scaled
    grad_up = call.weight_product(grad_pre_up, x, tokens, up, covered)
    grad_gate = x.new_empty(0)
    if gate is not None and grad_pre_gate is not None:
        grad_gate = call.weight_product(grad_pre_gate, x, tokens, gate, covered)
    call.width_product(grad_pre_up, grad_pre_gate, up, gate, None, slots, token_offsets, grad_x)
    return grad_x, grad_up, grad_gate, grad_down, grad_weights


@_backward.register_fake
def _(
    grad, x, up, gate, down, weights, tokens, offsets, slots, token_offsets, hidden, pre_up, pre_gate,
    starts, sizes, activation,
):  # fmt: skip
    grad_gate = torch.empty_like(gate) if gate is not None else x.new_empty(0)
    return x.new_empty(x.shape), torch.empty_like(up), grad_gate, torch.empty_like(down), torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, up, gate, down, weights, tokens, offsets, slots, token_offsets, starts, sizes, activation, _ = inputs
    _, hidden, pre_up, pre_gate = output
    ctx.mark_non_differentiable(hidden, pre_up, pre_gate)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, up, gate, down, weights, tokens, offsets, slots, token_offsets, hidden, pre_up, pre_gate)
    ctx.layout, ctx.activation = (starts, sizes), activation


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    gradients = _backward(grad.contiguous(), *ctx.saved_tensors, *ctx.layout, ctx.activation)
    grad_x, grad_up, grad_gate, grad_down, grad_weights = gradients
    gate = grad_gate if ctx.saved_tensors[2] is not None else None
    return grad_x, grad_up, gate, grad_down, grad_weights, None, None, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
