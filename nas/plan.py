"""Looking before training: size of the space, range of every cost, whether the budget can be met, estimated time."""

from __future__ import annotations

import time
from dataclasses import asdict
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from moesaic.nas.context import Context
from moesaic.nas.costs.analytic import parameters
from moesaic.nas.costs.latency.predictor import LatencyPredictor
from moesaic.nas.costs.latency.probe import autocast
from moesaic.nas.costs.price import Pricer
from moesaic.nas.search.budget import Budget, a_member_inside, cheapest, cost_ranges, resolve_budget
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.rivals import JUDGED
from moesaic.nas.stages.calibrate_latency import calibrated
from moesaic.nas.stages.run import Run
from moesaic.nas.terminal.progress import duration
from moesaic.nas.terminal.tables import plain_table, what_costs_are_per
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import MoesaicError
from moesaic.supernet import SliceSampler, Transformer, evaluate

_SAMPLES = 1000


def build_plan(run: Run) -> dict[str, Any]:
    """All figures of a plan. Nothing is trained; latency is calibrated once per machine."""
    predictor = LatencyPredictor.load(calibrated(run) / "predictor.json", run.device.fingerprint, str(run.device))
    pricer = Pricer(run.context, predictor=predictor)
    rng = Random(f"{run.config.seed}/plan")
    samples = [run.space.sample_balanced(rng) for _ in range(_SAMPLES)]
    ranges = cost_ranges(run.space, pricer, samples)
    budget = resolve_budget(run.config, run.space, pricer)
    problem: str | None = None
    share = 0.0
    try:
        inside = a_member_inside(run.space, budget)
        share = FeasibleSampler(run.space, budget, inside).acceptance(_SAMPLES, rng)
    except MoesaicError as error:
        problem = str(error)
    lines = []
    for line in budget.lines:
        single = Budget((line,), pricer)
        inside_line = sum(map(single.fits, samples)) / len(samples)
        lines.append(
            {
                "name": line.cost,
                "bind": line.bind,
                "limit": line.limit,
                "share": inside_line,
                "satisfiable": single.fits(cheapest(run.space, pricer, line.cost, line.bind)),
            }
        )
    return {
        "space": run.space.name,
        "cardinality": run.space.cardinality,
        "raw_cardinality": run.space.raw_cardinality,
        "envelope_parameters": parameters(run.space.envelope, run.context),
        "costs": ranges,
        "budget": lines,
        "share_inside": share,
        "problem": problem,
        "seconds": _estimate_seconds(run),
        "device": str(run.device),
        "context": asdict(run.context),
        "latency_error": predictor.accuracy.mape,
    }


def _estimate_seconds(run: Run) -> dict[str, float]:
    """Seconds per stage from a few passes of an untrained supernet; a training pass costs about three forward ones."""
    config, space = run.config, run.space
    torch.manual_seed(config.seed)
    model = Transformer(space.envelope, run.corpus.vocab_size).to(run.device.torch_device)
    windows = run.corpus.batch("train", config.supernet.batch_size, config.seed, 0)
    sampler = SliceSampler(space, config.seed, config.supernet.random_slices, config.supernet.sampling)

    def forward_seconds(architectures) -> float:
        start = time.perf_counter()
        with autocast(run.device):
            for architecture in architectures:
                evaluate(model, windows, architecture)
        return time.perf_counter() - start

    forward_seconds(sampler.slices(0))
    slices = sum(forward_seconds(sampler.slices(step)) for step in range(8)) / 8
    largest = sorted(forward_seconds([space.largest]) for _ in range(3))[1]
    alone = config.supernet.largest_first
    rng = Random(0)
    typical = forward_seconds([space.sample_balanced(rng) for _ in range(5)]) / 5
    models = 3 if config.retrain.rivals else 1
    per_window = typical / len(windows)
    evaluations = config.search.trials + (2 * JUDGED if config.retrain.rivals else 0)
    return {
        "supernet": 3 * (alone * largest + (1 - alone) * slices) * config.supernet.steps,
        "search": evaluations * config.search.evaluation_windows * per_window,
        "fidelity": 3 * config.fidelity.check * config.fidelity.steps * config.retrain.batch_size * per_window,
        "retrain": 3 * models * config.retrain.seeds * config.retrain.steps * config.retrain.batch_size * per_window,
    }


def print_plan(console: Console, plan: dict[str, Any], budget: str = "") -> None:
    """Print a plan; ``budget`` is the name of its budget where there are several."""
    console.print(Text(f"Space {plan['space']}", style="bold"))
    console.print(Text(f"  architectures        {plan['cardinality']:,} ({plan['cardinality']:.2e})"))
    console.print(Text(f"  as ordered experts   {plan['raw_cardinality']:.2e}"))
    envelope = DIMENSIONS["parameters"].format(plan["envelope_parameters"])
    console.print(Text(f"  supernet             {envelope} parameters"))
    limits = {line["name"]: line for line in plan["budget"]}
    columns = "cost|smallest|typical|largest|worst case|budget|met by|can be met"
    table = plain_table(f"Costs of the space, and the budget {budget}".rstrip(), columns, "cost|can be met")
    for name, costs in plan["costs"].items():
        form, line = DIMENSIONS[name].format, limits.get(name)
        row = [name, *(form(costs[k]) for k in ("smallest", "typical", "largest", "worst"))]
        if line:
            answer = Text("yes", style="green") if line["satisfiable"] else Text("NO", style="bold red")
            table.add_row(*row, form(line["limit"]), f"{line['share']:.1%}", answer)
        else:
            table.add_row(*row, "", "", "")
    console.print(table)
    console.print(Text(what_costs_are_per(Context(**plan["context"]))))
    if plan["problem"]:
        console.print(Text(f"The budget cannot be met: {plan['problem']}", style="red"))
    else:
        console.print(Text(f"The budget is met by {plan['share_inside']:.1%} of random architectures."))
    seconds = plan["seconds"]
    parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    console.print(Text(f"Estimated time on {plan['device']}: {duration(sum(seconds.values()))} ({parts})."))
    console.print(
        Text(
            "Threshold routers are priced before training as if they could not tell experts apart; "
            f"latency is predicted within {plan['latency_error']:.1%} on held-out models."
        )
    )
