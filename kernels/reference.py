"""The sparse layer in a few simple lines: the reference that every fast path is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.activations import ACTIVATIONS
from moesaic.kernels.layout import Bank, ExpertLayout, Routing


def activate(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """Hidden values [P, F] from the pre-activations [P, F] of ``up`` and, for a gated unit, of ``gate``."""
    function = ACTIVATIONS[activation].pointwise.forward
    return function(up) if gate is None else function(gate) * up


def sparse_ffn(x: Tensor, bank: Bank, layout: ExpertLayout, routing: Routing | None, activation: str) -> Tensor:
    """Sum over a token's experts of weight * expert(token); see ``kernels.sparse_ffn``. Differentiable by autograd."""
    width = x.shape[1]
    out = torch.zeros_like(x)
    for expert, (start, size) in enumerate(layout.segments):
        rows = slice(start, start + size)
        up, down = bank.up[rows, :width].to(x.dtype), bank.down[rows, :width].to(x.dtype)
        gate = None if bank.gate is None else bank.gate[rows, :width].to(x.dtype)
        if routing is None:
            tokens, weights = torch.arange(len(x), device=x.device), torch.ones(len(x), dtype=x.dtype, device=x.device)
        else:
            pairs = slice(int(routing.offsets[expert]), int(routing.offsets[expert + 1]))
            tokens, weights = routing.tokens[pairs], routing.weights[pairs].to(x.dtype)
        inputs = x[tokens]
        a = inputs @ up.T
        if bank.up_bias is not None:
            a = a + bank.up_bias[rows].to(x.dtype)
        hidden = activate(a, None if gate is None else inputs @ gate.T, activation)
        out = out.index_add(0, tokens, (hidden @ down) * weights[:, None])
    return out
