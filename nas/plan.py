"""A check before training: size of the space, range of every cost, whether the budget can be met, estimated time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from rich.console import Console
from rich.text import Text

from moesaic.nas.context import Context
from moesaic.nas.costs.analytic import parameters
from moesaic.nas.costs.latency.calibrate import seconds_per_flop
from moesaic.nas.costs.latency.predictor import LatencyPredictor
from moesaic.nas.costs.price import Pricer
from moesaic.nas.search.budget import Budget, CostRange, cheapest, cost_ranges, find_feasible, resolve_budget
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.stages.calibrate_latency import calibrated, known_calibration
from moesaic.nas.stages.run import BudgetRun, Run
from moesaic.nas.stages.stage import BY_NAME
from moesaic.nas.terminal.progress import duration
from moesaic.nas.terminal.tables import plain_table, what_costs_are_per
from moesaic.nas.training.recipe import supernet_recipe
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import Architecture, MoesaicError

_SAMPLES = 1000
_BATCH, _TOKENS = 64, 1024
"""Sequences whose mean length is that of a task; tokens of the pass that the machine's speed is taken from."""


@dataclass(frozen=True)
class PlannedLine:
    """A budget line in base units: the ``share`` of random members that meet it, and whether any member can."""

    name: str
    bind: str
    limit: float
    share: float
    satisfiable: bool


@dataclass(frozen=True)
class Plan:
    """Sizes of a space, ranges of its costs, and a budget: the ``share_inside`` it, or the ``problem`` if nothing fits.

    ``seconds`` are estimates per stage, empty where nothing was timed; ``latency_error`` is the predictor's mean error
    on held-out models, None where this machine has no calibration. Then budget lines of latency are ``unchecked``.
    """

    space: str
    cardinality: int
    raw_cardinality: int
    envelope_parameters: int
    costs: dict[str, CostRange]
    budget: tuple[PlannedLine, ...]
    share_inside: float
    problem: str | None
    seconds: dict[str, float]
    device: str
    context: Context
    latency_error: float | None
    unchecked: tuple[str, ...]


def build_plan(part: BudgetRun, latency: bool = False) -> Plan:
    """Nothing is trained, and no model as large as the supernet is made.

    With ``latency`` the machine is timed: latency is calibrated, unless it was before, and stages are estimated.
    Without, costs include latency only where this machine has a calibration.
    """
    run, space = part.run, part.run.space
    folder = calibrated(run) if latency else known_calibration(run)
    predictor = None if folder is None else LatencyPredictor.load(folder / "predictor.json", run.device)
    pricer = Pricer(run.context, predictor=predictor)
    rng = Random(f"{run.config.seed}/plan")
    samples = [space.sample_balanced(rng) for _ in range(_SAMPLES)]
    unchecked = () if predictor else tuple(name for name in part.limits if name == "latency")
    checked = {name: limit for name, limit in part.limits.items() if name not in unchecked}
    budget = resolve_budget(checked, space, pricer)
    problem: str | None = None
    share = 0.0 if budget.lines else 1.0
    try:
        if budget.lines:
            inside = find_feasible(space, budget)
            share = FeasibleSampler(space, budget, inside).acceptance(_SAMPLES, rng)
    except MoesaicError as error:
        problem = str(error)
    lines = []
    for line in budget.lines:
        single = Budget((line,), pricer)
        met = sum(map(single.fits, samples)) / len(samples)
        satisfiable = single.fits(cheapest(space, pricer, line.cost, line.bind))
        lines.append(PlannedLine(line.cost, line.bind, line.limit, met, satisfiable))
    return Plan(
        space=space.name,
        cardinality=space.cardinality,
        raw_cardinality=space.raw_cardinality,
        envelope_parameters=parameters(space.envelope, run.context),
        costs=cost_ranges(space, pricer, samples),
        budget=tuple(lines),
        share_inside=share,
        problem=problem,
        seconds=_estimate_seconds(run) if latency else {},
        device=str(run.device),
        context=run.context,
        latency_error=None if predictor is None else predictor.accuracy.mape,
        unchecked=unchecked,
    )


def _estimate_seconds(run: Run) -> dict[str, float]:
    """Seconds per stage, from FLOPs and the speed of one layer; a training step costs about 3 forward passes."""
    space = run.space
    batch = run.task.batch(_BATCH, 0, 0)
    length, source_length = (max(1, round(int(n.sum()) / _BATCH)) for n in (batch.counts(), batch.source_counts()))
    context = Context(
        run.task.vocab_size,
        length,
        max(8, _TOKENS // length),
        run.device.bytes_per_value,
        source_length=source_length if space.encoder else 0,
        source_vocab_size=run.task.source_vocab_size,
    )
    pricer, second_per_flop = Pricer(context), seconds_per_flop(space.smallest, context, run.device)

    def forward_seconds(architectures: Iterable[Architecture]) -> float:
        """Of one sequence."""
        work = sum(pricer.expected(architecture)["flops"] for architecture in architectures)
        return second_per_flop * work * context.sequence_length

    rng = Random(0)
    typical = forward_seconds([space.sample_balanced(rng) for _ in range(50)]) / 50
    return {
        "supernet": BY_NAME["supernet"].passes(run) * _supernet_seconds(run, forward_seconds),
        "search": BY_NAME["search"].passes(run) / len(run.budgets) * typical,
        **{name: BY_NAME[name].passes(run.budgets[0]) * typical for name in ("fidelity", "retrain")},
    }


def _supernet_seconds(run: Run, forward_seconds: Callable[[Iterable[Architecture]], float]) -> float:
    """Of one sequence that passes forward in stage supernet: a trained model, or a mean over the slices of a step."""
    if run.loaded.checkpoint is not None:
        return forward_seconds([run.space.largest])
    config = run.config.supernet
    data = supernet_recipe(run.config, run.space, run.device.bfloat16).data(run.task)
    first, alone = round(config.largest_first * config.steps), config.largest_first
    slices = sum(forward_seconds(data.slices(first + step)) for step in range(8)) / 8
    return alone * forward_seconds([run.space.largest]) + (1 - alone) * slices


def print_plan(console: Console, plan: Plan, budget: str = "") -> None:
    """Print a plan; ``budget`` is the name of its budget where there are several."""
    console.print(Text(f"Space {plan.space}", style="bold"))
    console.print(Text(f"  architectures        {plan.cardinality:,} ({plan.cardinality:.2e})"))
    console.print(Text(f"  as ordered experts   {plan.raw_cardinality:.2e}"))
    envelope = DIMENSIONS["parameters"].format(plan.envelope_parameters)
    console.print(Text(f"  supernet             {envelope} parameters"))
    limits = {line.name: line for line in plan.budget}
    columns = "cost|smallest|typical|largest|worst case|budget|met by|can be met"
    table = plain_table(f"Costs of the space, and the budget {budget}".rstrip(), columns, "cost|can be met")
    for name, costs in plan.costs.items():
        form, line = DIMENSIONS[name].format, limits.get(name)
        row = [name, *(form(value) for value in (costs.smallest, costs.typical, costs.largest, costs.worst))]
        if line:
            answer = Text("yes", style="green") if line.satisfiable else Text("NO", style="bold red")
            table.add_row(*row, form(line.limit), f"{line.share:.1%}", answer)
        else:
            table.add_row(*row, "", "", "")
    console.print(table)
    console.print(Text(what_costs_are_per(plan.context)))
    if plan.problem:
        console.print(Text(f"The budget cannot be met: {plan.problem}", style="red"))
    else:
        console.print(Text(f"The budget is met by {plan.share_inside:.1%} of random architectures."))
    if plan.unchecked:
        console.print(Text("The latency line is not checked: add --latency to time this machine.", style="yellow"))
    if seconds := plan.seconds:
        parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
        console.print(Text(f"Estimated time on {plan.device}: about {duration(sum(seconds.values()))} ({parts})."))
    else:
        console.print(Text("Nothing was timed; --latency calibrates latency and estimates the time of each stage."))
    known = (
        ""
        if plan.latency_error is None
        else (f"; latency is predicted within {plan.latency_error:.1%} on held-out models")
    )
    console.print(Text(f"Threshold routers are priced before training as if they could not tell experts apart{known}."))
