"""Time the sparse layer on a CPU against a dense layer of equal active FLOPs and other implementations.

Correctness is checked first. Rivals take turns in random order; a ratio compares times of the same round.
Within six minutes:
python experiments/kernels/cpu.py --threads 1 && python experiments/kernels/cpu.py --threads 2
Both runs are kept in one file. Hugging Face's layers are timed where transformers is installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rivals import Case, Problem, Run, grouped_mm
from torch import Tensor

from moesaic.kernels import Bank, ExpertLayout, reference, sparse_ffn
from moesaic.nas.device import processor_name, versions
from moesaic.search_spaces.files import write_json

OURS = "torch"
"""The implementation under test."""
SEED = 0
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest relative Frobenius error against the reference in float64."""
BATCHED_BYTES = 2**28
"""Hugging Face's ``batched_mm`` copies both matrices of an expert for every pair: left out above this many bytes."""

_MIXED_512 = (512, 256, 256, 128, 128, 64, 64, 32)
_MIXED_1024 = (1024, 512, 512, 256, 256, 128, 128, 64)


def case(tokens: int, width: int, sizes: tuple[int, ...], k: int, activation: str = "relu") -> Case:
    span = f"{sizes[0]}" if len(set(sizes)) == 1 else f"{min(sizes)}..{max(sizes)}"
    return Case(f"{tokens} x {width}, {len(sizes)} x {span}, top-{k}", "", tokens, width, sizes, k, None, activation)


ROWS = [
    (case(1024, 128, (96,) * 8, 2), torch.float32),
    (case(512, 128, (256,) * 8, 2), torch.float32),
    (case(512, 512, (512,) * 32, 2), torch.float32),
    (case(2048, 512, (1024,) * 8, 2), torch.float32),
    (case(2048, 256, (256,) * 32, 2), torch.float32),
    (case(4096, 512, (256,) * 32, 4), torch.float32),
    (case(512, 128, _MIXED_512, 2), torch.float32),
    (case(2048, 256, _MIXED_1024, 2), torch.float32),
    (case(4096, 256, _MIXED_512 * 2, 2), torch.float32),
    (Case("2048 x 256, 8 x 256, 1..8 by mass 0.5", "", 2048, 256, (256,) * 8, 8, 0.5, "relu"), torch.float32),
    (case(2048, 256, (512,) * 8, 2, "swiglu"), torch.float32),
    (case(512, 128, (256,) * 8, 2), torch.bfloat16),
    (case(2048, 512, (1024,) * 8, 2), torch.bfloat16),
    (case(2048, 256, _MIXED_1024, 2), torch.bfloat16),
]
"""Without float16, whose products torch computes 30 to 90 times slower than float32 on a CPU."""


@dataclass(frozen=True)
class Rival:
    """``run`` computes the layer; a backward pass is timed up to ``leaves``."""

    run: Run
    leaves: list[Tensor]

    def forward(self) -> None:
        with torch.no_grad():
            self.run()

    def both(self, direction: Tensor) -> None:
        torch.autograd.grad(self.run(), self.leaves, direction)


def dense(problem: Problem) -> Rival:
    """One expert of as many neurons as a token uses on average, by this tool's own dense path."""
    shape = (problem.active, problem.case.width)

    def matrix() -> Tensor:
        return (torch.randn(shape) * shape[1] ** -0.5).to(problem.x.dtype).requires_grad_()

    bank = Bank(matrix(), None if problem.gate is None else matrix(), matrix())
    leaves = [problem.x, *(m for m in (bank.up, bank.gate, bank.down) if m is not None)]
    layout = ExpertLayout((0,), (problem.active,))
    return Rival(lambda: sparse_ffn(problem.x, bank, layout, None, problem.case.activation, OURS), leaves)


def sparse(problem: Problem, implementation: str) -> Rival:
    def run() -> Tensor:
        return sparse_ffn(
            problem.x, problem.bank, problem.layout, problem.route(), problem.case.activation, implementation
        )

    return Rival(run, problem.leaves)


def sparse_given_routing(problem: Problem) -> Rival:
    with torch.no_grad():
        found = problem.route()
    weights = found.weights.requires_grad_()
    leaves = [weights, *(leaf for leaf in problem.leaves if leaf is not problem.logits)]
    activation = problem.case.activation
    return Rival(lambda: sparse_ffn(problem.x, problem.bank, problem.layout, found, activation, OURS), leaves)


def hugging_face(problem: Problem, implementation: str) -> Rival:
    """Experts of transformers (Mixtral's, or NemotronH's where there is no gate), padded to the largest."""
    up, gate, down = problem.stacked
    names = {"hidden_size": problem.case.width, "_experts_implementation": implementation}
    if gate is None:
        kind = import_module("transformers.models.nemotron_h.modeling_nemotron_h").NemotronHExperts
        names |= {"n_routed_experts": len(up), "moe_intermediate_size": up.shape[1], "moe_latent_size": None}
        names |= {"mlp_hidden_act": problem.case.activation}
    else:
        kind = import_module("transformers.models.mixtral.modeling_mixtral").MixtralExperts
        names |= {"num_local_experts": len(up), "intermediate_size": up.shape[1], "hidden_act": "silu"}
    experts: Any = kind(SimpleNamespace(**names)).to(up.dtype)
    with torch.no_grad():
        (experts.up_proj if gate is None else experts.gate_up_proj).copy_(
            up if gate is None else torch.cat((gate, up), 1)
        )
        experts.down_proj.copy_(down.transpose(1, 2))

    def run() -> Tensor:
        weights, chosen = problem.top_k()
        return experts(problem.x, chosen, weights.to(problem.x.dtype))

    return Rival(run, [problem.x, problem.logits, *experts.parameters()])


def rivals(problem: Problem) -> dict[str, Rival]:
    stacked = [m for m in problem.stacked if m is not None]
    found = {
        "dense": dense(problem),
        "routing given": sparse_given_routing(problem),
        "with routing": sparse(problem, OURS),
        "reference": sparse(problem, "reference"),
        "grouped_mm": Rival(grouped_mm(problem), [problem.x, problem.logits, *stacked]),
    }
    if problem.case.threshold is None and find_spec("transformers"):
        names = ["eager", "grouped_mm"]
        if problem.pairs * max(problem.case.sizes) * problem.case.width * 2 * problem.x.element_size() <= BATCHED_BYTES:
            names.append("batched_mm")
        found |= {f"HF {name}": hugging_face(problem, name) for name in names}
    return found


def check(problem: Problem, found: dict[str, Rival]) -> float:
    """Largest relative Frobenius error of our output and gradients; of the others' outputs too, in an assertion."""
    direction = torch.randn_like(problem.x)
    leaves = problem.leaves
    exact = {id(leaf): leaf.detach().double().requires_grad_() for leaf in leaves if leaf is not problem.logits}
    exact[id(problem.logits)] = problem.logits
    gate = None if problem.gate is None else exact[id(problem.gate)]
    bank = Bank(exact[id(problem.up)], gate, exact[id(problem.down)])
    truth = [reference.sparse_ffn(exact[id(problem.x)], bank, problem.layout, problem.route(), problem.case.activation)]
    truth += torch.autograd.grad(truth[0], [exact[id(leaf)] for leaf in leaves], direction.double())
    ours = [found["with routing"].run()]
    ours += torch.autograd.grad(ours[0], leaves, direction)

    def error(value: Tensor, expected: Tensor) -> float:
        return ((value.double() - expected).norm() / expected.norm()).item()

    worst = max(error(value, expected) for value, expected in zip(ours, truth, strict=True))
    tolerance = TOLERANCE[problem.x.dtype]
    if worst > tolerance:
        raise SystemExit(f"{problem.case.name}: relative error {worst:.1e} exceeds {tolerance}")
    for name, rival in found.items():
        if name != "dense" and error(rival.run().detach(), truth[0].detach()) > tolerance:
            raise SystemExit(f"{problem.case.name}: {name} computes something else")
    return worst


def timed(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step in each round, after two rounds of warming up.

    Each round has a new random order, since caches and heap depend on the step before.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    rng = Random(SEED)
    for number in range(rounds + 2):
        for name in rng.sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[name]()
            if number >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def measure(shape: Case, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(SEED)
    problem = Problem(shape, torch.device("cpu"), dtype, SEED)
    with torch.no_grad():
        # Few digits make pre-activations exact. Otherwise relu would sometimes be on the other side of zero than in
        # float64, and one such value causes a relative error of 1e-3 in a gradient.
        problem.x.mul_(4).round_().div_(4)
        problem.up.mul_(256).round_().div_(256)
    found = rivals(problem)
    worst = check(problem, found)
    direction = torch.randn_like(problem.x)
    passes = {
        "forward": {name: one.forward for name, one in found.items()},
        "forward+backward": {name: (lambda one=one: one.both(direction)) for name, one in found.items()},
    }
    rows = []
    for kind, steps in passes.items():
        times = timed(steps, rounds)
        base = times.pop("dense")
        rows.append(
            {
                **{key: value for key, value in asdict(shape).items() if key != "source"},
                "dtype": str(dtype).removeprefix("torch."),
                "pairs": problem.pairs,
                "largest_load": problem.largest_load,
                "pass": kind,
                "relative_error": float(f"{worst:.1e}"),
                "dense_ms": {"median": round(median(base), 3), "lower_quartile": round(quantiles(base)[0], 3)},
                "ratio": {
                    name: round(median(own / other for own, other in zip(values, base, strict=True)), 3)
                    for name, values in times.items()
                },
                "ratio_of_lower_quartiles": {
                    name: round(quantiles(values)[0] / quantiles(base)[0], 3) for name, values in times.items()
                },
            }
        )
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    table = Table(title="Time over that of a dense layer of equal active FLOPs")
    for column in ("layer", "pass", "dense ms", *names):
        table.add_column(column, justify="left" if column in ("layer", "pass") else "right")
    for row in rows:
        details = f"{row['name']}, {row['activation']}, {row['dtype']}"
        ratios = (f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "" for name in names)
        table.add_row(details, row["pass"], f"{row['dense_ms']['median']:.2f}", *ratios)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("cpu_result.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=200)
    if not find_spec("transformers"):
        console.print("Hugging Face's columns are left out: pip install transformers")
    rows: list[dict[str, Any]] = []
    for shape, dtype in ROWS:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            console.print(f"{shape.name}: left out, this processor has no bfloat16 products")
            continue
        rows += measure(shape, dtype, arguments.rounds)
    show(rows, console)
    transformers = {"transformers": __import__("transformers").__version__} if find_spec("transformers") else {}
    run = {
        "date": datetime.date.today().isoformat(),
        "device": processor_name(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "seed": SEED,
        "versions": {**versions(), **transformers},
        "rows": rows,
    }
    runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    others = [one for one in runs if one["threads"] != arguments.threads]
    write_json(arguments.out, {"runs": sorted([*others, run], key=lambda one: one["threads"])})


if __name__ == "__main__":
    main()
