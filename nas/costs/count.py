"""Counts the FLOPs of a module's pass with torch's counter and with fvcore, to compare with the closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moesaic.kernels import IMPLEMENTATIONS, Routing
from moesaic.nas.config import DeviceConfig
from moesaic.nas.context import Context
from moesaic.nas.costs.analytic import flops
from moesaic.nas.costs.latency.probe import Pass
from moesaic.nas.device import choose_device
from moesaic.search_spaces import MoesaicError
from moesaic.supernet import Transformer, experts


@dataclass(frozen=True)
class Counted:
    """FLOPs per token by one counter, and what it leaves out."""

    counter: str
    flops: float
    leaves_out: str


def count_flops(model: Transformer, context: Context) -> tuple[Counted, ...]:
    """The closed form under the load of one pass over random tokens, and what counters find in that pass, on the CPU.

    Raises
    ------
    MoesaicError : fvcore is not installed.
    """
    shape = (context.batch_size, context.sequence_length + 1)
    tokens = torch.randint(0, context.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    read = (context.batch_size, context.source_length)
    source = torch.randint(0, model.source_vocab_size or model.vocab_size, read, generator=generator)
    device = choose_device(DeviceConfig(device="cpu", dtype="float32"))
    one = Pass(model, tokens, context, device, source=source if context.source_length else None)
    return (
        Counted("closed form", flops(model.architecture, one.uses(), context), "all but matrix products"),
        Counted("torch FlopCounterMode", _torch_count(one) / context.tokens, "the same; attention is run unfused"),
        Counted(
            "fvcore",
            _fvcore_count(one) / context.tokens,
            "the same; its multiply-accumulates are doubled, and it is told what fused attention and routing are",
        ),
    )


def _torch_count(one: Pass) -> int:
    """A fused attention kernel of a CPU counts as nothing, so attention runs unfused."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        one.plain()
    return counter.get_total_flops()


def _fvcore_count(one: Pass) -> int:
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError:
        raise MoesaicError("fvcore is not installed", where="--count", nearest="pip install 'moesaic[count]'") from None

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = one.model

        def forward(self, _: Tensor) -> Tensor:
            return one.plain().logits

    with torch.no_grad(), _traceable(one.plain().routings):
        analysis = FlopCountAnalysis(Logits(), one.tokens).tracer_warnings("none")
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_products)
        counts = analysis.by_operator()
    return 2 * round(sum(counts[name] for name in ("linear", "matmul", "scaled_dot_product_attention")))


@contextmanager
def _traceable(routings: Sequence[Routing | None]) -> Iterator[None]:
    """The sparse layer in operators that a tracer knows: it does not look into an autograd function, and stumbles over
    what routing does. So each layer gets its known routing."""
    known = iter([routing for routing in routings if routing is not None])

    def route(logits: Tensor, **_: Any) -> Routing:
        routing = next(known)
        return replace(routing, weights=routing.weights + 0 * logits.sum())  # unused logits would not be traced

    fast, usual = IMPLEMENTATIONS["torch"], experts.route
    IMPLEMENTATIONS["torch"], experts.route = IMPLEMENTATIONS["reference"], route
    try:
        yield
    finally:
        IMPLEMENTATIONS["torch"], experts.route = fast, usual


def _attention_products(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-accumulates of queries [B, H, S, C] with keys [B, H, P, C], and of the scores with the values."""
    queries, keys = (value.type().sizes() for value in inputs[:2])
    return 2 * prod(queries) * keys[-2]
