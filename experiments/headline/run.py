"""Does a searched model beat what people would pick, at equal active FLOPs and at equal measured latency?

python experiments/headline/run.py stdlib [KEY=VALUE ...] [--lanes 2]
python experiments/headline/run.py wikitext-2 data.files=FOLDER [KEY=VALUE ...]
python experiments/headline/run.py summary

A data set's YAML is an ordinary run configuration; each line of its budget is asked by itself. DATASET.contestants.json
gets who competes and what each costs, DATASET.jsonl a row per training and budget. What is done is not repeated, so the
work may be stopped at any time. `summary` makes result.json, result.md and docs/headline.png of all rows there are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contestants import COUNTS, Candidate, Row, candidates, keeping, measured
from summary import read_rows, summarise

from moesaic.nas.config import load_config
from moesaic.nas.report.summary import versions
from moesaic.nas.search.thresholds import hold_budget
from moesaic.nas.stages.calibrate_latency import run_latency
from moesaic.nas.stages.directory import RunDirectory, fingerprint
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.train_supernet import run_supernet
from moesaic.nas.training.single import retrain, seed_directory
from moesaic.search_spaces import Architecture, MoesaicError
from moesaic.search_spaces.files import read_json, write_json
from moesaic.supernet import evaluate

HERE = Path(__file__).parent
FIGURE = HERE.parents[1] / "docs" / "headline.png"
SHARED = ("supernet", "latency")


@dataclass(frozen=True)
class Setting:
    """A data set's experiment: what a process needs to know to take part in it."""

    dataset: str
    overrides: tuple[str, ...]
    work: Path

    @property
    def shared(self) -> Run:
        """The run that trains the supernet and calibrates the latency for all budgets and kinds."""
        return Run(load_config(HERE / f"{self.dataset}.yaml", self.overrides), self.work / "shared")

    def run(self, cost: str, kind: str = "searched") -> Run:
        """The run of one budget line alone, whose first stages are links to the shared ones."""
        line = self.shared.config.budget[cost].model_dump()
        overrides = [*self.overrides, f"budget={json.dumps({cost: line})}"]
        if kind == "random":
            overrides.append("search.sampler=random")
        path = self.work / cost / kind
        path.mkdir(parents=True, exist_ok=True)
        for stage in SHARED:
            with suppress(FileExistsError):
                (path / stage).symlink_to(Path("../..") / "shared" / stage, target_is_directory=True)
        return Run(load_config(HERE / f"{self.dataset}.yaml", overrides), path)


def remembered(path: Path, identity: str, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, as JSON; from ``path`` when it was made for the same ``identity``."""
    if path.exists() and (known := read_json(path))["identity"] == identity:
        return known["value"]
    value = make()
    write_json(path, {"identity": identity, "value": value})
    return value


def rank(setting: Setting, cost: str, kind: str) -> list[Row]:
    """Candidates of a kind under a budget as ``{architecture, inherited_loss}``, best first."""
    run, searched = setting.run(cost, kind), setting.run(cost)

    def rows() -> list[Row]:
        return [
            {"architecture": one.architecture.to_dict(), "inherited_loss": one.inherited_loss}
            for one in candidates(run, kind, searched)
        ]

    identity = fingerprint(
        {name: one.stages[name].fingerprint for name, one in (("search", run), ("fidelity", searched))}
    )
    return remembered(run.path / "candidates.json", identity, rows)


def train_alone(setting: Setting, architecture: Row, seed: int, costs: list[str]) -> list[Row]:
    """A row for each budget that the architecture competes under, from one training from scratch.

    As in the tool's own stage, a model whose threshold routers keep more experts after training than the budget
    allows has its thresholds lowered. Costs follow from the routing on the test split; their latency is predicted.
    """
    member = Architecture.from_dict(architecture)
    runs = {cost: setting.run(cost) for cost in costs}
    any_run = runs[costs[0]]
    config, corpus = any_run.config.retrain, any_run.corpus
    identity = fingerprint({**training(any_run), "architecture": member.fingerprint, "seed": seed})
    directory = seed_directory(setting.work / "training" / member.fingerprint, seed)
    started = time.perf_counter()
    trained = retrain(member, config, corpus, any_run.device, seed, directory, identity)
    seconds = time.perf_counter() - started
    windows = any_run.windows("validation", any_run.config.search.evaluation_windows)
    rows = []
    for cost, run in runs.items():
        model, test = trained.model, trained.evaluation
        held = hold_budget(model, windows, run.budget)
        if held != member:
            model = model.extract(held).eval()
            test = evaluate(model, corpus.windows("test", config.evaluation_windows))
        row = {
            "budget": cost,
            "settings": settings(run),
            "fingerprint": member.fingerprint,
            "seed": seed,
            "steps": config.steps,
            "test_loss": round(test.loss, 6),
            "standard_error": round(test.standard_error, 6),
            "bits_per_byte": round(corpus.bits_per_byte("test", test.loss), 6),
            "validation_loss": round(evaluate(model, windows).loss, 6),
            "thresholds_lowered": held != member,
            "costs": {name: round(value, 3) for name, value in run.pricer.measured(held, test.loads).items()},
            "seconds": round(seconds, 1),
            "date": datetime.date.today().isoformat(),
            "device": str(run.device),
        }
        rows.append(row)
    return rows


def training(run: Run) -> Row:
    """What a training depends on beside its architecture and seed."""
    return {"corpus": run.corpus.fingerprint, **run.config.retrain.model_dump(exclude={"seeds", "rivals"})}


def settings(run: Run) -> str:
    """Identity of what rows of one budget have in common: only such are compared."""
    return fingerprint({**training(run), "budget": [str(line) for line in run.budget.lines]})


def choose(setting: Setting, pool: ProcessPoolExecutor) -> dict[str, Row]:
    """Of each budget line, its limit and the rows of its contestants; nothing else runs while they are measured."""
    costs = list(setting.shared.config.budget)
    ranked: dict[tuple[str, str], list[Row]] = {}
    # The searched ones first: what their run trained to check its ranking corrects the judge of all kinds.
    for kinds in (("searched",), [kind for kind in COUNTS if kind != "searched"]):
        jobs = {(cost, kind): pool.submit(rank, setting, cost, kind) for cost in costs for kind in kinds}
        ranked |= {key: job.result() for key, job in jobs.items()}
    budgets = {}
    for cost in costs:
        run = setting.run(cost)

        def measure(row: Row, run: Run = run) -> Row:
            return measured(run, Candidate(Architecture.from_dict(row["architecture"]), row["inherited_loss"]))

        def rows(cost: str = cost, measure: Callable[[Row], Row] = measure) -> list[Row]:
            return [row for kind in COUNTS for row in keeping(kind, ranked[cost, kind], measure)]

        identity = fingerprint({"settings": settings(run), "ranked": [ranked[cost, kind] for kind in COUNTS]})
        budgets[cost] = {
            "settings": settings(run),
            "limit": run.budget.lines[0].limit,
            "contestants": remembered(setting.work / cost / "measured.json", identity, rows),
        }
    return budgets


def train_all(setting: Setting, budgets: dict[str, Row], table: Path, pool: ProcessPoolExecutor) -> None:
    """Train every contestant with every seed, a training only once where it competes under several budgets."""
    config = setting.shared.config
    done = {(row["settings"], row["fingerprint"], row["seed"]) for row in read_rows(table)}
    todo: dict[tuple[int, str], tuple[Row, list[str]]] = {}
    # Seed by seed, so that a table that is cut off has all contestants under one seed before any under the next.
    for seed in range(config.seed, config.seed + config.retrain.seeds):
        for cost, budget in budgets.items():
            for row in budget["contestants"]:
                if row["rank"] and (budget["settings"], row["fingerprint"], seed) not in done:
                    _, costs = todo.setdefault((seed, row["fingerprint"]), (row["architecture"], []))
                    if cost not in costs:
                        costs.append(cost)
    print(f"{len(done)} rows are there, {len(todo)} trainings to go", flush=True)
    jobs = {
        pool.submit(train_alone, setting, architecture, seed, costs): seed
        for (seed, _), (architecture, costs) in todo.items()
    }
    for count, job in enumerate(as_completed(jobs), start=1):
        for row in job.result():
            with open(table, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            named = f"{row['budget']} {row['fingerprint']} seed {row['seed']}"
            print(f"{count}/{len(todo)} {named}: test {row['test_loss']:.4f}", flush=True)


def experiment(setting: Setting, out: Path, lanes: int) -> None:
    """All stages of one data set."""
    shared = setting.shared
    run_latency(shared)
    run_supernet(shared)
    with ProcessPoolExecutor(lanes, mp_context=multiprocessing.get_context("spawn")) as pool:
        budgets = choose(setting, pool)
        config = shared.config
        facts = {
            "dataset": setting.dataset,
            "device": str(shared.device),
            "context": str(shared.context),
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
            "steps": {"supernet": config.supernet.steps, "retrain": config.retrain.steps},
            "trials": config.search.trials,
            "budgets": budgets,
        }
        write_json(out / f"{setting.dataset}.contestants.json", facts)
        train_all(setting, budgets, out / f"{setting.dataset}.jsonl", pool)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stdlib", "wikitext-2", "summary"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the data set's YAML")
    parser.add_argument("--lanes", type=int, default=2, help="processes at a time, each with the threads of the YAML")
    parser.add_argument("--work", type=Path, help="folder of runs and weights (default experiments/headline/runs/WHAT)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where `summary` draws")
    chosen = parser.parse_intermixed_args()
    try:
        if chosen.what == "summary":
            summarise(chosen.out, chosen.figure)
            return 0
        work = (chosen.work or HERE / "runs" / chosen.what).resolve()
        chosen.out.mkdir(parents=True, exist_ok=True)
        with RunDirectory(work).locked():
            experiment(Setting(chosen.what, tuple(chosen.overrides), work), chosen.out, chosen.lanes)
    except MoesaicError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
