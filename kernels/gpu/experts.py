"""Forward and backward of the sparse layer on Triton kernels, registered as custom operators of torch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from moesaic.kernels.activations import ACTIVATIONS
from moesaic.kernels.gpu import expert_kernels as _device
from moesaic.kernels.gpu.tuning import cdiv, hidden_candidates, next_power_of_2, precision, tune_key, tuned
from moesaic.kernels.layout import Bank, ExpertLayout, Routing
from moesaic.kernels.workspace import hidden_stride, most_row_tiles, row_tile

device: Any = _device  # Any, because type checkers expect constexpr where a launch passes plain values


def sparse_ffn(x: Tensor, bank: Bank, layout: ExpertLayout, routing: Routing, activation: str) -> Tensor:
    """See ``kernels.sparse_ffn``. Does not synchronise with the device if ``routing`` has ``slots`` (made on a GPU).

    The kernels need contiguous vectors and contiguous rows of matrices; any other layout is copied here.
    """
    routing = routing.in_token_order()
    assert routing.slots is not None and routing.token_offsets is not None
    weights = [bank.up, bank.gate, bank.down]
    if len({m.stride() for m in weights if m is not None}) > 1 or bank.up.stride(1) != 1:
        weights = [m if m is None else m.contiguous() for m in weights]
    up, gate, down = weights
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *weights, bank.up_bias, routing.weights)
    )
    out, *_ = _forward(
        x if x.stride(1) == 1 else x.contiguous(),
        up,
        None if bank.up_bias is None else bank.up_bias.contiguous(),
        gate,
        down,
        routing.weights.contiguous(),
        routing.tokens.contiguous(),
        routing.offsets.contiguous(),
        routing.slots.contiguous(),
        routing.token_offsets.contiguous(),
        list(layout.starts),
        list(layout.sizes),
        activation,
        needs_grad,
    )
    return out


class _Call:
    """Arguments that the launches of one forward or backward pass share."""

    def __init__(self, x: Tensor, bank: Tensor, tokens: Tensor, offsets: Tensor, starts: list[int], sizes: list[int]):
        self.pairs, self.experts, self.width = len(tokens), len(sizes), x.shape[1]
        self.max_columns = max(sizes)
        self.rows = row_tile(self.pairs, self.experts)
        self.offsets = offsets
        self.starts, self.sizes = _on_device(tuple(starts), tuple(sizes), x.device)
        self.tune = tune_key(self.width, self.max_columns, self.pairs)
        self.stride_hidden = hidden_stride(sizes)
        self.acc = triton.language.float64 if x.dtype == torch.float64 else triton.language.float32
        # A divisor of every expert's size. It tells the compiler how wide loads may be and which need no mask.
        aligned = math.gcd(128, *sizes)
        self.shared = {"D": self.width, "ALIGNED": aligned, "ACC": self.acc, "PRECISION": precision(x.dtype)}
        self.row_tiles = most_row_tiles(self.pairs, self.experts, self.rows)
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
        return (self.row_tiles * cdiv(self.max_columns, meta["BN"]),)

    def width_grid(self, meta: dict[str, int]) -> tuple[int]:
        return (self.row_tiles * cdiv(self.width, meta["BN"]),)

    def weight_grid(self, meta: dict[str, int]) -> tuple[int]:
        neuron_tiles = cdiv(self.max_columns, meta["BM"])
        return (self.experts * neuron_tiles * cdiv(self.width, meta["BN"]),)

    def hidden_product(
        self, rows: Tensor, tokens: Tensor, up: Tensor, hidden: Tensor, pointwise: str, gate: Tensor | None = None,
        up_bias: Tensor | None = None, pre_up: Tensor | None = None, pre_gate: Tensor | None = None,
    ) -> None:  # fmt: skip
        """hidden [P, F] = activation(rows[tokens] @ up.T + up_bias), and the pre-activations if buffers are given."""
        candidates = hidden_candidates(pointwise, gate is not None)
        tuned(device.hidden_product, candidates, self.rows, self.value_bytes)[self.hidden_grid](
            rows, tokens, up, gate, up_bias, hidden, pre_up, pre_gate, self.offsets, self.starts, self.sizes,
            self.tiles, rows.stride(0), self.stride_weight, self.stride_hidden, self.max_columns, self.tune,
            POINTWISE=pointwise, BM=self.rows, **self.shared,
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
            self.stride_hidden, right.stride(0), out.stride(0), self.max_columns, self.tune, **self.shared,
        )  # fmt: skip
        return out

    def bias_sum(self, left: Tensor, like: Tensor) -> Tensor:
        """Gradient of the bank's vector ``like``: the sum of left's rows per expert, zeros outside the experts."""
        out, columns = torch.zeros_like(like), 64
        device.bias_backward[(self.experts * cdiv(self.max_columns, columns),)](
            left, out, self.offsets, self.starts, self.sizes, self.stride_hidden, self.max_columns,
            ACC=self.acc, BM=64, BN=columns,
        )  # fmt: skip
        return out


@lru_cache(maxsize=1024)
def _on_device(starts: tuple[int, ...], sizes: tuple[int, ...], where: torch.device) -> tuple[Tensor, Tensor]:
    """Layout tables on the device, copied once per layout."""
    with torch.inference_mode(False):
        both = torch.tensor([starts, sizes], dtype=torch.int32, device=where)
    return both[0], both[1]


@torch.library.custom_op("moesaic::sparse_ffn", mutates_args=())
def _forward(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, D] and, with ``keep``, what the backward pass needs (else empty): pre-activations [P, F] of ``up``,
    or hidden values if the activation ``keeps_hidden``, and pre-activations [P, F] of ``gate`` (empty without one)."""
    out, kept, pre_gate = _forward_outputs(x, gate, tokens, sizes, keep)
    if not len(tokens):
        return out.zero_(), kept, pre_gate
    chosen = ACTIVATIONS[activation]
    call = _Call(x, up, tokens, offsets, starts, sizes)
    hidden = kept if keep and chosen.keeps_hidden else call.hidden(x)
    call.hidden_product(
        x, tokens, up, hidden, chosen.pointwise.name, gate, up_bias,
        pre_up=kept if keep and not chosen.keeps_hidden else None,
        pre_gate=pre_gate if keep and gate is not None else None,
    )  # fmt: skip
    call.width_product(hidden, None, down, None, weights, slots, token_offsets, out)
    return out, kept, pre_gate


def _forward_outputs(
    x: Tensor, gate: Tensor | None, tokens: Tensor, sizes: list[int], keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors that ``_forward`` fills, when traced and when run."""
    shape = (len(tokens), hidden_stride(sizes))
    kept = x.new_empty(shape if keep else (0,))
    return x.new_empty(x.shape), kept, x.new_empty(shape if keep and gate is not None else (0,))


@_forward.register_fake
def _(x, up, up_bias, gate, down, weights, tokens, offsets, slots, token_offsets, starts, sizes, activation, keep):
    return _forward_outputs(x, gate, tokens, sizes, keep)


@torch.library.custom_op("moesaic::sparse_ffn_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    down: Tensor,
    weights: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    slots: Tensor,
    token_offsets: Tensor,
    kept: Tensor,
    pre_gate: Tensor,
    starts: list[int],
    sizes: list[int],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, up, up_bias and gate (each empty without one), down, and the pairs' weights."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    # Without unused rows or columns the kernel writes every element of the bank's gradient.
    covered = sum(sizes) == len(up) and x.shape[1] == up.shape[1]
    if not len(tokens):

        def zeros(leaf: Tensor | None) -> Tensor:
            return x.new_empty(0) if leaf is None else torch.zeros_like(leaf)

        return grad_x.zero_(), zeros(up), zeros(up_bias), zeros(gate), zeros(down), zeros(weights)
    call = _Call(x, up, tokens, offsets, starts, sizes)
    grad_pre_up, scaled = call.hidden(x), call.hidden(x)
    grad_pre_gate = call.hidden(x) if gate is not None else None
    # Entries past the pairs that a threshold kept must get gradient 0, not uninitialised memory.
    grad_weights = torch.zeros_like(weights)
    call.hidden_product(grad, tokens, down, grad_pre_up, "none")
    device.activation_backward[(call.row_tiles,)](
        grad_pre_up, kept, None if gate is None else pre_gate, weights, grad_pre_gate, scaled, grad_weights,
        offsets, call.sizes, call.tiles, call.stride_hidden,
        POINTWISE=ACTIVATIONS[activation].pointwise.name, ALIGNED=call.shared["ALIGNED"], ACC=call.acc,
        BM=call.rows, BN=4096 // call.rows, num_warps=8,
    )  # fmt: skip
    grad_down = call.weight_product(scaled, grad, tokens, down, covered)
    del scaled
    grad_up = call.weight_product(grad_pre_up, x, tokens, up, covered)
    grad_bias = x.new_empty(0) if up_bias is None else call.bias_sum(grad_pre_up, up_bias)
    grad_gate = x.new_empty(0)
    if gate is not None and grad_pre_gate is not None:
        grad_gate = call.weight_product(grad_pre_gate, x, tokens, gate, covered)
    call.width_product(grad_pre_up, grad_pre_gate, up, gate, None, slots, token_offsets, grad_x)
    return grad_x, grad_up, grad_bias, grad_gate, grad_down, grad_weights


@_backward.register_fake
def _(
    grad, x, up, up_bias, gate, down, weights, tokens, offsets, slots, token_offsets, kept, pre_gate,
    starts, sizes, activation,
):  # fmt: skip
    leaves = (up, up_bias, gate, down, weights)
    return x.new_empty(x.shape), *(x.new_empty(0) if leaf is None else torch.empty_like(leaf) for leaf in leaves)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, starts, sizes, activation, _ = inputs
    kept = output[1:]
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *kept)
    ctx.layout, ctx.activation = (starts, sizes), activation


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 14
    up_bias, gate = ctx.saved_tensors[2:4]
    gradients = _backward(grad.contiguous(), *ctx.saved_tensors, *ctx.layout, ctx.activation)
    grad_x, grad_up, grad_bias, grad_gate, grad_down, grad_weights = gradients
    grad_bias, grad_gate = None if up_bias is None else grad_bias, None if gate is None else grad_gate
    return grad_x, grad_up, grad_bias, grad_gate, grad_down, grad_weights, *(None,) * 8


_forward.register_autograd(_differentiate, setup_context=_save)
