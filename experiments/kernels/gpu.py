"""Time the sparse layer on a GPU against other implementations, on published and on uneven shapes.

Correctness is checked first. Forward and forward+backward in bfloat16, from router logits to output, interleaved;
medians of CUDA event times. One command, within ten minutes:
python experiments/kernels/gpu.py --out experiments/kernels/gpu_result.json [--scattermoe CHECKOUT]
``--smoke`` runs tiny shapes in Triton's interpreter on the CPU: to show that the script works; times are meaningless.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from rich.console import Console
from rich.table import Table
from rivals import Case, Problem, Run, rivals
from torch import Tensor

from moesaic.kernels import Bank, reference
from moesaic.kernels.routing import route

_MIXED = (64, 128, 256, 512, 1024, 2048, 4096, 768)
CASES = [
    Case("qwen3-30b-a3b", "Liger PR 1294; SonicMoE", 32768, 2048, (768,) * 128, 8),
    Case("qwen3-30b-a3b, 8k", "Liger benchmark", 8192, 2048, (768,) * 128, 8),
    Case("sonic 768 fine", "SonicMoE (arXiv 2512.14080)", 40960, 768, (256,) * 128, 8),
    Case("sonic 768 coarse", "SonicMoE (arXiv 2512.14080)", 40960, 768, (1024,) * 32, 2),
    Case("sonic 1536", "SonicMoE (arXiv 2512.14080)", 24576, 1536, (256,) * 128, 8),
    Case("sonic 4096", "SonicMoE (arXiv 2512.14080)", 32768, 4096, (1024,) * 64, 4),
    Case("scattermoe 1.5b", "ScatterMoE (arXiv 2403.08245)", 16384, 1024, (3584,) * 8, 2),
    Case("megablocks medium", "MegaBlocks (arXiv 2211.15841)", 16384, 1024, (4096,) * 64, 1, activation="gelu"),
    Case("mixed 2048", "uneven sizes 64..4096", 16384, 2048, _MIXED * 4, 2),
    Case("mixed 1024", "uneven sizes 64..4096", 32768, 1024, _MIXED * 2, 2),
    Case("threshold 2048", "1..8 experts per token", 16384, 2048, (1024,) * 16, 8, threshold=0.5),
    Case("small 256", "launch-bound", 4096, 256, (128, 256, 384, 512) * 2, 2),
    Case("decode 512", "launch-bound", 64, 512, (256, 512, 768, 1024) * 4, 2),
]
SMOKE = [
    Case("uniform", "smoke", 24, 32, (32,) * 4, 2),
    Case("mixed", "smoke", 24, 32, (16, 48, 32, 16), 2),
    Case("threshold", "smoke", 24, 32, (16, 48, 32, 16), 3, threshold=0.5, activation="gelu"),
]
PROPORTION = Case("proportion", "cost against executed pairs", 16384, 2048, (1024,) * 32, 1)
"""Timed with 1, 2, 4 and 8 experts per token."""


class Clock:
    """Times of one call in milliseconds: CUDA events, or the wall clock for the smoke run."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def __call__(self, run: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)


def dtype(device: torch.device) -> torch.dtype:
    """bfloat16; float32 in the interpreter, which multiplies the raw bits of bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def with_backward(run: Run, problem: Problem) -> Callable[[], None]:
    direction = torch.randn_like(problem.x)

    def step() -> None:
        torch.autograd.backward(run(), direction)

    return step


def without_gradients(run: Run) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    return forward


def interleaved(steps: dict[str, Callable[[], Any]], clock: Clock, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, in turns for about ``seconds`` after two warm-up rounds; one round if 0."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2 if seconds else 0):
        for step in steps.values():
            step()
    start, least = time.perf_counter(), 5 if seconds else 1
    while time.perf_counter() - start < seconds or len(times[next(iter(times))]) < least:
        for name, step in steps.items():
            times[name].append(clock(step))
    return {name: median(values) for name, values in times.items()}


def peak_mib(step: Callable[[], Any]) -> float:
    """Peak MiB that ``step`` allocates beyond what was allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def graphed_ms(run: Run, clock: Clock) -> float:
    """Median of the same forward pass replayed from a CUDA graph, without the cost of launches."""
    forward = without_gradients(run)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        forward()
        forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    return median(clock(graph.replay) for _ in range(50))


def relative_error(run: Run, problem: Problem) -> float:
    """Largest relative Frobenius error of output and gradients against the reference in float32 on float32 copies."""
    case, direction = problem.case, torch.randn_like(problem.x)
    leaves = problem.leaves
    found = [run()]
    found += torch.autograd.grad(found[0], leaves, direction, allow_unused=True)
    exact = {id(leaf): leaf.detach().float().requires_grad_() for leaf in leaves}
    gate = None if problem.gate is None else exact[id(problem.gate)]
    bank = Bank(exact[id(problem.up)], gate, exact[id(problem.down)])
    routing = route(exact[id(problem.logits)], max_experts=case.max_experts, threshold=case.threshold)
    out = reference.sparse_ffn(exact[id(problem.x)], bank, problem.layout, routing, case.activation)
    expected = [out, *torch.autograd.grad(out, list(exact.values()), direction.float())]
    pairs = zip(found, expected, strict=True)
    # A library's own copy of the weights is not one of our leaves and has no gradient here.
    errors = [((a.float() - b).norm() / b.norm()).detach() for a, b in pairs if a is not None]
    return float(torch.stack(errors).max())


def check(cases: list[Case], device: torch.device, path: Path | None) -> dict[str, dict[str, float]]:
    """Errors of every rival on every case, with fewer tokens. Exits if ours is wrong."""
    errors: dict[str, dict[str, float]] = {}
    for case in cases:
        few = Case(**{**case.__dict__, "tokens": min(case.tokens, 512)})
        problem = Problem(few, device, dtype(device))
        errors[case.name] = {}
        for name, make in rivals(few, path).items():
            if name not in ("dense", "moesaic, routing given"):
                errors[case.name][name] = relative_error(make(problem), problem)
        if errors[case.name]["moesaic"] > 1e-2:
            sys.exit(f"{case.name}: relative error {errors[case.name]['moesaic']:.2g} exceeds 1e-2; nothing was timed")
        del problem
    return errors


def matrix_rate(device: torch.device, clock: Clock, size: int) -> float:
    """TFLOP/s of one square bfloat16 product through cuBLAS."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    milliseconds = interleaved({"mm": lambda: a @ b}, clock, 1.0 if clock.cuda else 0.0)["mm"]
    return 2 * size**3 / milliseconds / 1e9


def measure(case: Case, device: torch.device, clock: Clock, path: Path | None, seconds: float) -> dict[str, Any]:
    """One row: for each rival milliseconds and TFLOP/s of both passes, and peak memory of a training step."""
    problem = Problem(case, device, dtype(device))
    runs = {name: make(problem) for name, make in rivals(case, path).items()}
    forward = interleaved({n: without_gradients(r) for n, r in runs.items()}, clock, seconds)
    steps = {n: with_backward(r, problem) for n, r in runs.items()}
    both = interleaved(steps, clock, seconds)
    row: dict[str, Any] = {
        "case": case.name, "source": case.source, "tokens": case.tokens, "width": case.width,
        "experts": len(case.sizes), "sizes": sorted(set(case.sizes)), "max_experts": case.max_experts,
        "threshold": case.threshold, "activation": case.activation, "pairs": problem.pairs, "rivals": {},
    }  # fmt: skip
    for name in runs:
        row["rivals"][name] = {
            "forward_ms": round(forward[name], 4),
            "step_ms": round(both[name], 4),
            "forward_tflops": round(problem.flops / forward[name] / 1e9, 1),
            "step_tflops": round(3 * problem.flops / both[name] / 1e9, 1),
        }
        if clock.cuda:
            for leaf in problem.leaves:
                leaf.grad = None
            row["rivals"][name]["peak_mib"] = round(peak_mib(steps[name]), 1)
    if clock.cuda:
        row["graphed_forward_ms"] = graphed_ms(runs["moesaic"], clock)
        row["launch_bound_share"] = round(1 - row["graphed_forward_ms"] / forward["moesaic"], 3)
    return row


def proportion(device: torch.device, clock: Clock, seconds: float) -> dict[str, Any]:
    """Time per executed pair against its mean over 1, 2, 4 and 8 experts per token."""
    per_pair = {}
    for count in (1, 2, 4, 8):
        problem = Problem(Case(**{**PROPORTION.__dict__, "max_experts": count}), device)
        run = rivals(problem.case, None)["moesaic, routing given"](problem)
        per_pair[count] = interleaved({"": without_gradients(run)}, clock, seconds)[""] / problem.pairs
    mean = sum(per_pair.values()) / len(per_pair)
    deviation = {count: round(value / mean - 1, 3) for count, value in per_pair.items()}
    return {"deviation": deviation, "worst": max(map(abs, deviation.values()))}


def targets(rows: list[dict[str, Any]], rate: float, proportional: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Each goal of the kernels, its worst measured figure, and whether it is met."""

    def worst(against: str, kind: Callable[[dict[str, Any]], bool], figure: str) -> float | None:
        found = [
            row["rivals"][against][figure] / row["rivals"]["moesaic"][figure]
            for row in rows
            if kind(row) and against in row["rivals"]
        ]
        return round(min(found), 2) if found else None

    def equal(row: dict[str, Any]) -> bool:
        return len(row["sizes"]) == 1

    found = []
    for kind, name in ((equal, "equal sizes"), (lambda row: not equal(row), "uneven sizes")):
        for against, goal in (("scattermoe", 1.5), ("torch grouped_mm", 2.0), ("liger", 1.0)):
            least = goal if kind is equal else 1.5
            for figure in ("forward_ms", "step_ms"):
                ratio = worst(against, kind, figure)
                found.append({"goal": f"{name}: times faster than {against}, {figure}", "least": least, "found": ratio})
        found.append({"goal": f"{name}: ScatterMoE's peak memory over ours", "least": 1.0,
                      "found": worst("scattermoe", kind, "peak_mib")})  # fmt: skip
    wide = [row["rivals"]["moesaic"] for row in rows if row["width"] >= 2048 and row["tokens"] >= 8192]
    for figure, least in (("forward_tflops", 0.70), ("step_tflops", 0.55)):
        share = round(min(row[figure] for row in wide) / rate, 3) if wide else None
        found.append({"goal": f"share of the matrix rate at width >= 2048, {figure}", "least": least, "found": share})
    if proportional is not None:
        found.append({"goal": "1 - worst deviation of cost per pair", "least": 0.9,
                      "found": round(1 - proportional["worst"], 3)})  # fmt: skip
    return [{**goal, "met": None if goal["found"] is None else goal["found"] >= goal["least"]} for goal in found]


def precompile(case: Case, capability: int) -> None:
    """Compile every candidate of a case into Triton's cache, in a separate process without the GPU."""
    from compile import compile_candidates

    compile_candidates(capability, case)


def show(console: Console, rows: list[dict[str, Any]], goals: list[dict[str, Any]], rate: float) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["rivals"]))
    for figure in ("forward_tflops", "step_tflops"):
        table = Table("case", *names, title=f"{figure}; matrix rate {rate:.0f} TFLOP/s")
        for row in rows:
            table.add_row(row["case"], *(str(row["rivals"].get(n, {}).get(figure, "-")) for n in names))
        console.print(table)
    table = Table("goal", "at least", "found", "met")
    for goal in goals:
        met = {True: "yes", False: "NO", None: "not measured"}[goal["met"]]
        table.add_row(goal["goal"], str(goal["least"]), str(goal["found"]), met)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    parser.add_argument("--scattermoe", type=Path, help="a checkout of ScatterMoE to measure beside ours")
    parser.add_argument("--seconds", type=float, default=1.0, help="time of each case and pass")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes in the interpreter, on the CPU")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        sys.exit("no CUDA device; --smoke shows that the script works")
    device = torch.device("cpu" if arguments.smoke else "cuda")
    clock, cases, path = Clock(device), SMOKE if arguments.smoke else CASES, arguments.scattermoe
    started = time.perf_counter()
    if clock.cuda:
        major, minor = torch.cuda.get_device_capability()
        workers = max(1, (os.cpu_count() or 2) - 2)
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(partial(precompile, capability=10 * major + minor), cases))
    errors = check(cases, device, path)
    rate = matrix_rate(device, clock, 8192 if clock.cuda else 64)
    rows = [measure(case, device, clock, path, arguments.seconds if clock.cuda else 0.0) for case in cases]
    proportional = proportion(device, clock, arguments.seconds) if clock.cuda else None
    goals = targets(rows, rate, proportional)
    show(Console(width=170), rows, goals, rate)
    result = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if clock.cuda else "interpreter",
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "seed": 0,
        "seconds": round(time.perf_counter() - started, 1),
        "matrix_tflops": round(rate, 1),
        "errors": errors,
        "rows": rows,
        "proportion": proportional,
        "targets": goals,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
