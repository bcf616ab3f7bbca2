"""Compute a sparse feed-forward layer fast on this device. Imports torch and triton alone."""

from __future__ import annotations

from torch import Tensor

from kernels import reference, segments
from kernels.layout import Bank, ExpertLayout, Routing
from kernels.routing import route

IMPLEMENTATIONS = {"reference": reference.sparse_ffn, "segments": segments.sparse_ffn}


def sparse_ffn(
    x: Tensor,
    bank: Bank,
    layout: ExpertLayout,
    routing: Routing | None,
    activation: str,
    implementation: str = "segments",
) -> Tensor:
    """Feed-forward layer of many experts: each token's weighted sum over the experts it is routed to.

    Parameters
    ----------
    x : [T, D] hidden states.
    bank : matrices [N, D_max] with D <= D_max and any floating dtype; they are read in place.
    layout : rows of each expert in the bank. Experts may differ in size.
    routing : sorted pairs; None when there is one expert that every token uses with weight 1 (a dense layer).
    activation : ``relu``, ``gelu`` or ``swiglu`` (which needs ``bank.gate``).
    implementation : a key of ``IMPLEMENTATIONS``.

    Returns
    -------
    [T, D], in the dtype of x. A token without pairs gets zeros. Differentiable in x, the bank and the weights.
    """
    if (bank.gate is None) == (activation == "swiglu"):
        raise ValueError(f"activation {activation} {'needs' if activation == 'swiglu' else 'has no'} gate")
    return IMPLEMENTATIONS[implementation](x, bank, layout, routing, activation)


__all__ = ["IMPLEMENTATIONS", "Bank", "ExpertLayout", "Routing", "route", "sparse_ffn"]
