"""Ground truth of the fidelity experiment: train every member of the set alone, from scratch, with each seed.

python experiments/fidelity/truth.py small|gpu [--seeds 2] [--lanes 2]

Writes members.jsonl and truth.jsonl in the variant's folder, a row per training; rows that are there are not repeated,
so the work may be stopped at any time and spread over days.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from members import stratified

from moesaic.nas.config import load_config
from moesaic.nas.costs.price import Pricer
from moesaic.nas.stages.run import Run
from moesaic.nas.training.single import retrain
from moesaic.search_spaces import Architecture
from moesaic.supernet import evaluate

HERE = Path(__file__).parent


def open_run(variant: str) -> Run:
    """The variant's configuration, with its corpus and device ready to use."""
    return Run(load_config(HERE / f"{variant}.yaml"), HERE / variant)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_row(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def train_alone(variant: str, architecture: dict[str, Any], seed: int) -> dict[str, Any]:
    """Losses and measured costs of one architecture trained from scratch."""
    run = open_run(variant)
    config = run.config.retrain
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trained = retrain(
            Architecture.from_dict(architecture), config, run.corpus, run.device, seed, Path(folder), "fidelity"
        )
    seconds = time.perf_counter() - started
    model, test = trained.model, trained.evaluation
    validation = evaluate(model, run.windows("validation", run.config.search.evaluation_windows))
    costs = Pricer(run.context).measured(model.architecture, validation.loads)
    return {
        "fingerprint": model.architecture.fingerprint,
        "steps": config.steps,
        "test_loss": round(test.loss, 6),
        "standard_error": round(test.standard_error, 6),
        "validation_loss": round(validation.loss, 6),
        "flops": round(costs["flops"]),
        "parameters": round(costs["parameters"]),
        "active_parameters": round(costs["active_parameters"]),
        "seconds": round(seconds, 1),
        "date": datetime.date.today().isoformat(),
        "device": str(run.device),
    }


def choose_members(run: Run) -> list[dict[str, Any]]:
    """The rows of members.jsonl, which is written when it is not there: the set stays what it was."""
    path = run.path / "members.jsonl"
    if not path.exists():
        centre = run.config.limits()["flops"].resolve(0.0)
        for member in stratified(run.space, Pricer(run.context), centre, run.config.seed):
            row = {"member": member.number, "stratum": member.stratum, "architecture": member.architecture.to_dict()}
            append_row(path, row)
    return read_rows(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=("small", "gpu"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--lanes", type=int, default=2, help="trainings at the same time, each with the threads of the YAML"
    )
    arguments = parser.parse_args()
    run = open_run(arguments.variant)
    run.path.mkdir(exist_ok=True)
    members = choose_members(run)
    table = run.path / "truth.jsonl"
    done = {(row["member"], row["seed"]) for row in read_rows(table)}
    # Seed by seed, so that a table that is cut off has all members under one seed before any under the next.
    todo = [(m, seed) for seed in range(arguments.seeds) for m in members if (m["member"], seed) not in done]
    print(f"{len(done)} rows are there, {len(todo)} to go", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.lanes, mp_context=context) as pool:
        jobs = {
            pool.submit(train_alone, arguments.variant, m["architecture"], seed): (m["member"], seed)
            for m, seed in todo
        }
        for count, job in enumerate(as_completed(jobs), start=1):
            member, seed = jobs[job]
            row = {"member": member, "seed": seed, **job.result()}
            append_row(table, row)
            print(f"{count}/{len(todo)} member {member} seed {seed}: test {row['test_loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
