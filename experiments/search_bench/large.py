"""The same searches on a space too large to be known: the quickstart's, 2.5e16 architectures, on its supernet.

python experiments/search_bench/large.py [--seeds 3]     searches that are not in large.jsonl yet

Trains the supernet of ``experiments/quickstart.yaml`` in ``runs/large`` unless it is there. Evaluations are kept, so
that two searches do not repeat each other's; each still counts for both. ``run.py`` sums up.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from curves import Truth, point
from methods import METHODS
from table import HERE

from moesaic.nas.config import load_config
from moesaic.nas.costs.price import Pricer
from moesaic.nas.costs.use import Occupancy
from moesaic.nas.search.budget import resolve_budget
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.train_supernet import run_supernet
from moesaic.search_spaces import Architecture
from moesaic.search_spaces.files import read_json
from moesaic.supernet import Evaluation, LayerLoad, evaluate

POINTS = HERE / "large.jsonl"
COUNT, WINDOWS = 300, 24
CONFIG = HERE.parent / "quickstart.yaml"
BUDGET = "budget={flops: 1.2 MFLOPs}"
"""The quickstart's other lines are left out: a latency is that of one machine."""
CHOSEN = ("evolution", "nsga2", "random", "puzzle", "AutoMoE's evolution", "tpe", "Optuna's NSGA-II, plain")


class Judge:
    """The supernet's evaluation, remembered in a file."""

    def __init__(self, run: Run):
        self.model, self.windows = run.supernet, run.windows("validation", WINDOWS)
        self.path = run.path / "evaluations.jsonl"
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
        self.known = {row["fingerprint"]: row for row in map(json.loads, lines)}

    def __call__(self, architecture: Architecture) -> Evaluation:
        row = self.known.get(architecture.fingerprint)
        if row is None:
            found = evaluate(self.model, self.windows, architecture)
            loads = [load and load.pairs_per_token for load in found.loads]
            row = {"fingerprint": architecture.fingerprint, "loss": found.loss, "loads": loads}
            self.known[architecture.fingerprint] = row
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        loads = tuple(load and LayerLoad(tuple(load)) for load in row["loads"])
        return Evaluation(row["loss"], 0.0, self.windows[:, 1:].numel(), loads)


def read_points() -> dict[tuple[str, int], list[np.ndarray | None]]:
    """(loss, FLOPs) of each evaluation by method and seed; None outside the budget."""
    rows = map(json.loads, POINTS.read_text().splitlines()) if POINTS.exists() else []
    return {
        (row["method"], row["seed"]): [None if one is None else np.array(one) for one in row["points"]] for row in rows
    }


def best_known(points: dict[tuple[str, int], list[np.ndarray | None]]) -> Truth:
    """The front of everything that any of the searches found."""
    return Truth.of(np.array([one for found in points.values() for one in found if one is not None]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    run = Run(load_config(CONFIG, [BUDGET]), HERE / "runs" / "large")
    run_supernet(run)
    torch.set_num_threads(1)
    occupancy = Occupancy.from_rows(read_json(run.stages["supernet"].path / "occupancy.json"))
    budget = resolve_budget(run.config, run.space, Pricer(run.context, occupancy))
    judge, done = Judge(run), read_points()
    for seed in range(seeds):
        for method in CHOSEN:
            if (method, seed) in done:
                continue
            started = time.process_time()
            asked = METHODS[method](run.space, budget, judge, seed, COUNT)
            found = [point(budget, architecture, judge(architecture)) for architecture in asked]
            rounded = [None if one is None else [round(one[0], 5), round(one[1])] for one in found]
            row = {"method": method, "seed": seed, "date": time.strftime("%Y-%m-%d"), "points": rounded}
            with POINTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{method} seed {seed}: {time.process_time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
