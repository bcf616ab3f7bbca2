"""Other implementations of the sparse layer, from router logits to output, to compare the Triton kernels with.

Each takes a ``Problem`` and returns a function without arguments. A library that is not installed is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels import ACTIVATIONS, Bank, ExpertLayout, Routing, route, sparse_ffn
from moesaic.kernels.reference import activate
from moesaic.kernels.routing import route as torch_route

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A layer: ``tokens`` of ``width`` through experts of ``sizes``, at most ``max_experts`` of them for each token.

    Without a ``threshold`` every token uses ``max_experts`` experts. ``source`` is the publication of the shape.
    """

    name: str
    source: str
    tokens: int
    width: int
    sizes: tuple[int, ...]
    max_experts: int
    threshold: float | None = None
    activation: str = "swiglu"

    @property
    def uniform(self) -> bool:
        return len(set(self.sizes)) == 1


class Problem:
    """Tensors of a case. ``leaves`` have gradients; libraries with uniform experts get them padded to the largest."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=device, dtype=kind)
            return (values * scale).requires_grad_()

        neurons, width = sum(case.sizes), case.width
        self.case = case
        self.x = normal(case.tokens, width)
        self.logits = normal(case.tokens, len(case.sizes), kind=torch.float32)
        scale = width**-0.5
        self.up, self.down = normal(neurons, width, scale=scale), normal(neurons, width, scale=scale)
        self.gate = normal(neurons, width, scale=scale) if ACTIVATIONS[case.activation].gated else None
        starts = [sum(case.sizes[:i]) for i in range(len(case.sizes))]
        self.layout = ExpertLayout(tuple(starts), case.sizes)
        load = torch_route(self.logits.detach(), max_experts=case.max_experts, threshold=case.threshold).load.tolist()
        self.pairs = sum(load)
        self.largest_load = max(load)
        matrices = 2 if self.gate is None else 3
        self.flops = 2 * matrices * width * sum(n * size for n, size in zip(load, case.sizes, strict=True))
        """Of the forward pass: two per multiply-accumulate of executed pairs."""
        self.active = max(16, round(self.flops / (2 * matrices * width * case.tokens) / 16) * 16)
        """Neurons of a dense layer of equal FLOPs."""

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.x, self.logits, self.up, self.gate, self.down) if leaf is not None]

    @property
    def bank(self) -> Bank:
        return Bank(self.up, self.gate, self.down)

    @cached_property
    def stacked(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """up, gate, down as [E, F, D], zero rows where an expert is smaller."""

        def stack(matrix: Tensor) -> Tensor:
            out = matrix.new_zeros(len(self.case.sizes), max(self.case.sizes), self.case.width)
            for expert, (start, size) in enumerate(self.layout.segments):
                out[expert, :size] = matrix.detach()[start : start + size]
            return out.requires_grad_()

        return stack(self.up), None if self.gate is None else stack(self.gate), stack(self.down)

    def route(self) -> Routing:
        return torch_route(self.logits, max_experts=self.case.max_experts, threshold=self.case.threshold)

    def top_k(self) -> tuple[Tensor, Tensor]:
        """Normalised weights and experts [T, k], as torch code writes it."""
        weights, experts = self.logits.softmax(-1).topk(self.case.max_experts, dim=-1)
        return weights / weights.sum(-1, keepdim=True), experts

    def hidden(self, product: Callable[[Tensor], Tensor]) -> Tensor:
        """Activation over ``product`` with up and gate, stacked."""
        up, gate, _ = self.stacked
        return activate(product(up), None if gate is None else product(gate), self.case.activation)


def ours(problem: Problem) -> Run:
    def run() -> Tensor:
        case = problem.case
        found = route(problem.logits, max_experts=case.max_experts, threshold=case.threshold)
        return sparse_ffn(problem.x, problem.bank, problem.layout, found, case.activation, "triton")

    return run


def ours_given_routing(problem: Problem) -> Run:
    case = problem.case
    with torch.no_grad():
        found = route(problem.logits, max_experts=case.max_experts, threshold=case.threshold)
    return lambda: sparse_ffn(problem.x, problem.bank, problem.layout, found, case.activation, "triton")


def dense(problem: Problem) -> Run:
    """cuBLAS: one expert of as many neurons as a token uses on average."""
    shape = (problem.active, problem.case.width)
    gated = problem.gate is not None

    def matrix() -> Tensor:
        return (torch.randn_like(problem.up[:1].expand(shape)) * shape[1] ** -0.5).requires_grad_()

    bank, layout = Bank(matrix(), matrix() if gated else None, matrix()), ExpertLayout((0,), (problem.active,))
    return lambda: sparse_ffn(problem.x, bank, layout, None, problem.case.activation)


def expert_loop(problem: Problem) -> Run:
    """A product per expert over sorted rows, with a custom backward: the tool's path without Triton."""
    return lambda: sparse_ffn(
        problem.x, problem.bank, problem.layout, problem.route(), problem.case.activation, "torch"
    )


def _combine(problem: Problem, found: Routing, rows: Tensor) -> Tensor:
    weighted = rows * found.weights[:, None].to(rows.dtype)
    return torch.zeros_like(problem.x).index_add(0, found.tokens, weighted)


def grouped_mm(problem: Problem) -> Run:
    """``torch.nn.functional.grouped_mm`` over gathered rows, experts padded to the largest."""

    def run() -> Tensor:
        found = problem.route()
        ends = found.offsets[1:].int()
        rows = problem.x[found.tokens]
        hidden = problem.hidden(lambda w: F.grouped_mm(rows, w.transpose(1, 2), offs=ends))
        return _combine(problem, found, F.grouped_mm(hidden, problem.stacked[2], offs=ends))

    return run


def foreach_mm(problem: Problem) -> Run:
    """``torch._foreach_mm`` over the experts' own sizes: private, but the only torch operation for uneven sizes."""
    product: Any = vars(torch)["_foreach_mm"]  # private, and absent before torch 2.13

    def run() -> Tensor:
        found = problem.route()
        rows = problem.x[found.tokens].split(found.load.tolist())

        def pieces(matrix: Tensor) -> list[Tensor]:
            return [matrix[start : start + size] for start, size in problem.layout.segments]

        ups = product(list(rows), [m.t() for m in pieces(problem.up)])
        gate = problem.gate
        gates = [None] * len(ups) if gate is None else product(list(rows), [m.t() for m in pieces(gate)])
        hidden = [activate(u, g, problem.case.activation) for u, g in zip(ups, gates, strict=True)]
        return _combine(problem, found, torch.cat(list(product(hidden, pieces(problem.down)))))

    return run


def padded_bmm(problem: Problem) -> Run:
    """One batched product, every expert padded to the largest load and the largest size."""

    def run() -> Tensor:
        found = problem.route()
        expert = torch.repeat_interleave(torch.arange(len(problem.case.sizes), device=problem.x.device), found.load)
        slot = torch.arange(len(found.tokens), device=problem.x.device) - found.offsets[expert]
        rows = problem.x.new_zeros(len(problem.case.sizes), problem.largest_load, problem.case.width)
        rows = rows.index_put((expert, slot), problem.x[found.tokens])
        hidden = problem.hidden(lambda w: torch.bmm(rows, w.transpose(1, 2)))
        return _combine(problem, found, torch.bmm(hidden, problem.stacked[2])[expert, slot])

    return run


def liger(problem: Problem) -> Run:
    """Liger-Kernel's fused mixture of experts (swiglu, top-k), experts padded to the largest."""
    function = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    up, gate, down = problem.stacked
    assert gate is not None
    with torch.no_grad():
        both, transposed = torch.cat((gate, up), 1), down.transpose(1, 2).contiguous()
    both.requires_grad_()
    transposed.requires_grad_()

    def run() -> Tensor:
        weights, experts = problem.top_k()
        return function.apply(problem.x, both, transposed, experts.int(), weights.to(problem.x.dtype))

    return run


def scattermoe(problem: Problem) -> Run:
    """ScatterMoE's gated or plain layer (top-k), experts padded to the largest."""
    module = import_module("scattermoe.mlp")
    case, gated = problem.case, problem.gate is not None
    kind = module.GLUMLP if gated else module.MLP
    activation = torch.nn.SiLU() if gated else torch.nn.GELU() if case.activation == "gelu" else torch.nn.ReLU()
    layer = kind(case.width, max(case.sizes), len(case.sizes), case.max_experts, activation=activation)
    layer = layer.to(problem.x.device, problem.x.dtype)
    up, gate, down = problem.stacked
    with torch.no_grad():
        layer.experts.weight.copy_(up if gate is None else torch.cat((up, gate), 1))  # [E, out, in]
        layer.output_experts.weight.copy_(down.transpose(1, 2))

    def run() -> Tensor:
        weights, experts = problem.top_k()
        return layer(problem.x, weights.to(problem.x.dtype), experts)

    return run


def rivals(case: Case, scattermoe_path: Path | None) -> dict[str, Callable[[Problem], Run]]:
    """The implementations that can compute ``case`` here, by name."""
    found: dict[str, Callable[[Problem], Run]] = {
        "moesaic": ours,
        "moesaic, routing given": ours_given_routing,
        "dense": dense,
        "expert loop": expert_loop,
        "padded bmm": padded_bmm,
    }
    if hasattr(F, "grouped_mm"):
        found["torch grouped_mm"] = grouped_mm
    if hasattr(torch, "_foreach_mm"):
        found["torch _foreach_mm"] = foreach_mm
    if case.threshold is None:
        if case.activation == "swiglu" and _there("liger_kernel.ops.fused_moe"):
            found["liger"] = liger
        if scattermoe_path is not None:
            if str(scattermoe_path) not in sys.path:
                sys.path.insert(0, str(scattermoe_path))
            found["scattermoe"] = scattermoe
    return found


def _there(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True
