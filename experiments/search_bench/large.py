"""The same searches on a space too large to enumerate: the quickstart's, 2.5e16 architectures, on its supernet.

python -m experiments.search_bench.large [--seeds 3]     searches that are not in large.jsonl yet

Trains the supernet of ``experiments/quickstart.yaml`` in ``runs/large`` unless it exists. Evaluations are cached and
shared by all searches; a cached one still counts as an evaluation. ``run.py`` summarises.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from experiments.common import append_row, do_stage, parser_of, read_rows, run_script, today
from experiments.search_bench.curves import Truth, point
from experiments.search_bench.methods import METHODS
from experiments.search_bench.table import HERE, measured_occupancy
from moesaic import Architecture, Evaluation, Occupancy, Pricer, Run, open_run, resolve_budget
from moesaic.supernet import LayerLoad, evaluate

POINTS = HERE / "large.jsonl"
COUNT, WINDOWS = 300, 24
CONFIG = HERE.parent / "quickstart.yaml"
BUDGET = "budget={flops: 1.2 MFLOPs}"
"""The quickstart's other budget lines are left out, since latency depends on the machine."""
CHOSEN = ("evolution", "nsga2", "random", "puzzle", "AutoMoE's evolution", "tpe", "Optuna's NSGA-II, plain")


class Remembered:
    """The supernet's evaluations, cached in a file."""

    def __init__(self, run: Run):
        self.model, self.batch = run.supernet, run.task.held_out("validation", WINDOWS)
        self.path = run.path / "evaluations.jsonl"
        self.known = {row["fingerprint"]: row for row in read_rows(self.path)}

    def __call__(self, architecture: Architecture) -> Evaluation:
        row = self.known.get(architecture.fingerprint)
        if row is None:
            found = evaluate(self.model, self.batch, architecture)
            loads = [load and load.pairs_per_token for load in found.loads]
            row = {"fingerprint": architecture.fingerprint, "loss": found.loss, "loads": loads}
            self.known[architecture.fingerprint] = row
            append_row(self.path, row)
        loads = tuple(load and LayerLoad(tuple(load)) for load in row["loads"])
        return Evaluation(row["loss"], 0.0, self.batch.tokens.numel(), loads)


def read_points() -> dict[tuple[str, int], list[np.ndarray | None]]:
    """(loss, FLOPs) of each evaluation by method and seed; None outside the budget."""
    return {
        (row["method"], row["seed"]): [None if one is None else np.array(one) for one in row["points"]]
        for row in read_rows(POINTS)
    }


def best_known(points: dict[tuple[str, int], list[np.ndarray | None]]) -> Truth:
    """The front of everything that any search found."""
    return Truth.of(np.array([one for found in points.values() for one in found if one is not None]))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    run = open_run(CONFIG, [BUDGET], HERE / "runs" / "large")
    do_stage(run, "supernet")
    torch.set_num_threads(1)
    pricer = Pricer(run.context, Occupancy.of(measured_occupancy(run)))
    budget = resolve_budget(run.config.budget, run.space, pricer)
    evaluations, done = Remembered(run), read_points()
    for seed in range(seeds):
        for method in CHOSEN:
            if (method, seed) in done:
                continue
            started = time.process_time()
            asked = METHODS[method](run.space, budget, evaluations, seed, COUNT)
            found = [point(budget, architecture, evaluations(architecture)) for architecture in asked]
            rounded = [None if one is None else [round(one[0], 5), round(one[1])] for one in found]
            append_row(POINTS, {"method": method, "seed": seed, "date": today(), "points": rounded})
            print(f"{method} seed {seed}: {time.process_time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    run_script(main)
