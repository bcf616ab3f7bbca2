"""Compute a sparse feed-forward layer fast on this device. Imports only torch and triton."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from moesaic.kernels import inference, reference, routing, segments, traced
from moesaic.kernels.activations import ACTIVATIONS, Activation
from moesaic.kernels.layout import Bank, ExpertLayout, Routing
from moesaic.kernels.routing import PairWeights, Score
from moesaic.kernels.workspace import Implementation


def _triton(x: Tensor, bank: Bank, layout: ExpertLayout, routing: Routing | None, activation: str) -> Tensor:
    from moesaic.kernels import gpu

    # A dense layer is two or three matrix products, which cuBLAS does best.
    if routing is None or len(layout.sizes) > gpu.MAX_EXPERTS:
        return segments.sparse_ffn(x, bank, layout, routing, activation)
    return gpu.sparse_ffn(x, bank, layout, routing, activation)


def _torch(x: Tensor, bank: Bank, layout: ExpertLayout, routing: Routing | None, activation: str) -> Tensor:
    if torch.compiler.is_compiling():
        return traced.sparse_ffn(x, bank, layout, routing, activation)
    compute = inference.sparse_ffn if inference.applies(x, bank, layout, routing) else segments.sparse_ffn
    return compute(x, bank, layout, routing, activation)


IMPLEMENTATIONS = {"reference": reference.sparse_ffn, "torch": _torch, "triton": _triton}


@lru_cache
def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on ``device``: an NVIDIA GPU from Ampere on, and Triton installed."""
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def implementation_on(device: torch.device) -> Implementation:
    """The default implementation on ``device``, except for float64."""
    return "triton" if has_triton(device) else "torch"


def sparse_ffn(
    x: Tensor,
    bank: Bank,
    layout: ExpertLayout,
    routing: Routing | None,
    activation: str,
    implementation: str | None = None,
) -> Tensor:
    """Feed-forward layer of many experts: each token's weighted sum over the experts it is routed to.

    Parameters
    ----------
    x : [T, D] hidden states.
    bank : matrices [N, D_max] with D <= D_max, and ``up_bias`` [N] or None. Any floating dtype; read in place.
    layout : rows of each expert in the bank. Experts may differ in size.
    routing : sorted pairs; None when there is one expert that every token uses with weight 1 (a dense layer).
    activation : a key of ``ACTIVATIONS``. A gated one needs ``bank.gate``, which the others must not have.
    implementation : a key of ``IMPLEMENTATIONS``; by default ``triton`` where it runs, else ``torch``.

    Returns
    -------
    [T, D], in the dtype of x. A token without pairs gets zeros. Differentiable in x, the bank and the weights.

    Raises
    ------
    ValueError : an unknown activation; a gate without a gated activation or the reverse; an ``up_bias`` that is not
        one value per neuron; several experts without a routing; float16 on a CPU.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation}: use one of {', '.join(ACTIVATIONS)}")
    gated = ACTIVATIONS[activation].gated
    if gated != (bank.gate is not None):
        raise ValueError(f"activation {activation} {'needs a' if gated else 'has no'} gate")
    if bank.up_bias is not None and bank.up_bias.shape != bank.up.shape[:1]:
        raise ValueError(f"up_bias has shape {list(bank.up_bias.shape)}, but there are {len(bank.up)} neurons")
    if routing is None and len(layout.sizes) != 1:
        raise ValueError("without a routing there is one expert, which every token uses")
    if x.dtype == torch.float16 and x.device.type == "cpu":
        raise ValueError("float16 is 30 to 90 times slower than float32 on a CPU: use float32 or bfloat16")
    if implementation is None:
        implementation = "torch" if x.dtype == torch.float64 else implementation_on(x.device)
    if routing is not None and routing.slots is not None and implementation != "triton":
        routing = routing.trimmed()  # made on a GPU, with unused entries at the end that only the Triton kernels skip
    return IMPLEMENTATIONS[implementation](x, bank, layout, routing, activation)


def route(
    logits: Tensor,
    *,
    max_experts: int,
    threshold: float | None = None,
    score: Score = "softmax",
    weights: PairWeights = "sum",
) -> Routing:
    """Choose experts for each token: see ``kernels.routing.route``. Uses the Triton kernels where they run."""
    if has_triton(logits.device) and logits.shape[1] > 1 and score == "softmax" and weights != "one":
        from moesaic.kernels import gpu

        if logits.shape[1] <= gpu.MAX_EXPERTS:
            return gpu.route(logits, max_experts=max_experts, threshold=threshold, normalise=weights == "sum")
    return routing.route(logits, max_experts=max_experts, threshold=threshold, score=score, weights=weights)


__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "Activation",
    "Bank",
    "ExpertLayout",
    "Implementation",
    "Routing",
    "has_triton",
    "implementation_on",
    "route",
    "sparse_ffn",
]
