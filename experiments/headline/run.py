"""Does a searched model beat what people would pick, at equal active FLOPs and at equal measured latency?

python -m experiments.headline.run stdlib [KEY=VALUE ...] [--lanes 2]
python -m experiments.headline.run wikitext-2 data.files=FOLDER [KEY=VALUE ...]
python -m experiments.headline.run summary

A data set's YAML is an ordinary run configuration; each line of its budget is a separate comparison.
DATASET.models.json gets the models and their costs, DATASET.jsonl a row per training and budget. Existing results are
not repeated, so the work may be stopped at any time. `summary` makes result.json, result.md and docs/headline.png from
all rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments.common import (
    DOCS,
    Row,
    append_row,
    digest,
    do_stage,
    facts,
    in_processes,
    parser_of,
    read_rows,
    run_script,
    today,
)
from experiments.headline.models import COUNTS, Candidate, candidates, keeping, measured, search
from experiments.headline.summary import summarise
from moesaic import (
    Architecture,
    BudgetRun,
    MoesaicError,
    Run,
    lower_thresholds_to_fit,
    open_run,
    read_value,
    single_recipe,
    write_value,
)

HERE = Path(__file__).parent
SHARED = ("latency", "supernet")


@dataclass(frozen=True)
class Setting:
    """A data set's experiment, with all that a worker process needs."""

    dataset: str
    overrides: tuple[str, ...]
    work: Path

    @property
    def shared(self) -> Run:
        """The run that trains the supernet and calibrates the latency for all budgets and kinds."""
        return open_run(HERE / f"{self.dataset}.yaml", self.overrides, self.work / "shared")

    def part(self, cost: str, kind: str = "searched") -> BudgetRun:
        """The run of a single budget line, whose first stages are links to the shared ones."""
        line = self.shared.config.budget[cost].model_dump()
        overrides = [*self.overrides, f"budget={json.dumps({cost: line})}"]
        if kind == "random":
            overrides.append("search.sampler=random")
        path = self.work / cost / kind
        path.mkdir(parents=True, exist_ok=True)
        for stage in SHARED:
            with suppress(FileExistsError):
                (path / stage).symlink_to(Path("../..") / "shared" / stage, target_is_directory=True)
        (part,) = open_run(HERE / f"{self.dataset}.yaml", overrides, path).budgets
        return part


def remembered(path: Path, identity: str, make: Callable[[], Any]) -> Any:
    """The result of ``make``, cached as JSON in ``path`` and reused for the same ``identity``."""
    if path.exists() and (known := read_value(path, dict))["identity"] == identity:
        return known["value"]
    value = make()
    write_value(path, {"identity": identity, "value": value})
    return value


def rank(setting: Setting, cost: str, kind: str) -> list[Row]:
    """Candidates of a kind under a budget as ``{architecture, inherited_loss}``, best first."""
    part, searched = setting.part(cost, kind), setting.part(cost)
    search(part, kind)

    def rows() -> list[Row]:
        return [
            {"architecture": one.architecture.to_dict(), "inherited_loss": one.inherited_loss}
            for one in candidates(part, kind, searched)
        ]

    identity = digest(
        {"search": part.folder("search").result_id(), "fidelity": searched.folder("fidelity").result_id()}
    )
    return remembered(part.path / "candidates.json", identity, rows)


def train_alone(setting: Setting, architecture: Row, seed: int, costs: list[str]) -> list[Row]:
    """A row for each budget that the architecture is trained for, from one training from scratch.

    As in the tool's own stage, thresholds are lowered if the routers keep more experts after training than the budget
    allows. Costs are those of the routing on the test split; latency is predicted.
    """
    member = Architecture.from_dict(architecture)
    parts = {cost: setting.part(cost) for cost in costs}
    run = parts[costs[0]].run
    config, task = run.config.retrain, run.task
    identity = digest({**training(run), "architecture": member.fingerprint, "seed": seed})
    directory = setting.work / "training" / member.fingerprint / f"seed-{seed}"
    started = time.perf_counter()
    trained = run.trainer.finish(single_recipe(member, config, seed, run.device.bfloat16), directory, identity)
    seconds = time.perf_counter() - started
    rows = []
    for cost, part in parts.items():
        validation = run.judge("validation", run.config.search.evaluation_windows, trained)
        held = lower_thresholds_to_fit(validation, part.budget)
        test = run.judge("test", config.evaluation_windows, trained)(held)
        row = {
            "budget": cost,
            "settings": settings(part),
            "fingerprint": member.fingerprint,
            "seed": seed,
            "steps": config.steps,
            "test_loss": round(test.loss, 6),
            "standard_error": round(test.standard_error, 6),
            "bits_per_byte": round(task.measure("test", test.loss)["bits_per_byte"], 6),
            "validation_loss": round(validation(held).loss, 6),
            "thresholds_lowered": held != member,
            "costs": {name: round(value, 3) for name, value in part.run.pricer.measured(held, test.loads).items()},
            "seconds": round(seconds, 1),
            "date": today(),
            "device": str(run.device),
        }
        rows.append(row)
    return rows


def training(run: Run) -> Row:
    """The identity of a training beside its architecture and seed."""
    return {"corpus": run.task.fingerprint, **run.config.retrain.model_dump(exclude={"seeds", "rivals"})}


def settings(part: BudgetRun) -> str:
    """The identity that rows of one budget share; only rows of the same identity are compared."""
    return digest({**training(part.run), "budget": [str(line) for line in part.budget.lines]})


def choose(setting: Setting, lanes: int) -> dict[str, Row]:
    """The limit of each budget line and the rows of its models. Nothing else runs during the measurements."""
    costs = list(setting.shared.config.budget)
    ranked: dict[tuple[str, str], list[Row]] = {}
    # The searched ones first: the trainings that check their ranking also correct the judge of the other kinds.
    for kinds in (("searched",), [kind for kind in COUNTS if kind != "searched"]):
        jobs = {(cost, kind): (setting, cost, kind) for cost in costs for kind in kinds}
        ranked |= {key: job.result() for key, job in in_processes(rank, jobs, lanes)}
    budgets = {}
    for cost in costs:
        part = setting.part(cost)

        def measure(row: Row, part: BudgetRun = part) -> Row:
            return measured(part, Candidate(Architecture.from_dict(row["architecture"]), row["inherited_loss"]))

        def rows(cost: str = cost, measure: Callable[[Row], Row] = measure) -> list[Row]:
            return [row for kind in COUNTS for row in keeping(kind, ranked[cost, kind], measure)]

        identity = digest({"settings": settings(part), "ranked": [ranked[cost, kind] for kind in COUNTS]})
        budgets[cost] = {
            "settings": settings(part),
            "limit": part.budget.lines[0].limit,
            "models": remembered(setting.work / cost / "measured.json", identity, rows),
        }
    return budgets


def train_all(setting: Setting, budgets: dict[str, Row], table: Path, lanes: int) -> None:
    """Train every model with every seed, only once if it appears under several budgets."""
    config = setting.shared.config
    done = {(row["settings"], row["fingerprint"], row["seed"]) for row in read_rows(table)}
    todo: dict[tuple[int, str], tuple[Setting, Row, int, list[str]]] = {}
    # Seed by seed, so that an incomplete table has all models under one seed before any under the next.
    for seed in range(config.seed, config.seed + config.retrain.seeds):
        for cost, budget in budgets.items():
            for row in budget["models"]:
                if row["rank"] and (budget["settings"], row["fingerprint"], seed) not in done:
                    key = seed, row["fingerprint"]
                    costs = todo.setdefault(key, (setting, row["architecture"], seed, []))[-1]
                    if cost not in costs:
                        costs.append(cost)
    print(f"{len(done)} rows are there, {len(todo)} trainings to go", flush=True)
    for count, (_, job) in enumerate(in_processes(train_alone, todo, lanes), start=1):
        for row in job.result():
            append_row(table, row)
            named = f"{row['budget']} {row['fingerprint']} seed {row['seed']}"
            print(f"{count}/{len(todo)} {named}: test {row['test_loss']:.4f}", flush=True)


def experiment(setting: Setting, out: Path, lanes: int) -> None:
    """All stages of one data set."""
    shared = setting.shared
    for stage in SHARED:
        do_stage(shared, stage)
    budgets = choose(setting, lanes)
    config = shared.config
    result = {
        "dataset": setting.dataset,
        **facts(shared.device),
        "context": str(shared.context),
        "steps": {"supernet": config.supernet.steps, "retrain": config.retrain.steps},
        "trials": config.search.trials,
        "budgets": budgets,
    }
    write_value(out / f"{setting.dataset}.models.json", result)
    train_all(setting, budgets, out / f"{setting.dataset}.jsonl", lanes)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=("stdlib", "wikitext-2", "summary"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the data set's YAML")
    parser.add_argument("--lanes", type=int, default=2, help="processes at a time, each with the threads of the YAML")
    parser.add_argument("--work", type=Path, help="folder of runs and weights (default experiments/headline/runs/WHAT)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--figure", type=Path, default=DOCS / "headline.png", help="where `summary` draws")
    chosen = parser.parse_intermixed_args()
    if chosen.what == "summary":
        summarise(chosen.out, chosen.figure)
        return
    work = (chosen.work or HERE / "runs" / chosen.what).resolve()
    work.mkdir(parents=True, exist_ok=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / ".lock", timeout=0):
            experiment(Setting(chosen.what, tuple(chosen.overrides), work), chosen.out, chosen.lanes)
    except Timeout:
        raise MoesaicError("another run of this experiment is in progress", where=str(work)) from None


if __name__ == "__main__":
    run_script(main)
