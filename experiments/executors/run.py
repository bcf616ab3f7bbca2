"""Overhead of the search's engine beside the evaluations: in this process, in lanes of Ray or Ray Tune, on four nodes.

python -m experiments.executors.run engines [--trials 1000] [--rounds 3]  cost of an evaluation of no duration
python -m experiments.executors.run lanes [--trials 200] [--rounds 5]     throughput and cost per evaluation
python -m experiments.executors.run length [--trials 10000]               does the cost per trial grow with them?
python -m experiments.executors.run memory                                does a lane copy the weights?

`engines` evaluates given architectures of the preset `tiny` on one short sequence, without a sampler or a log. Other
searches are complete (proposals, budget, log on disk, Optuna's journal) and use the preset `small`. `lanes` evaluates
with random weights of the supernet, which take as long as trained ones; `length` with a formula, so that only the
engine takes time. Run nothing else beside `engines` and `lanes`.
"""

from __future__ import annotations

import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal

import ray
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray.cluster_utils import Cluster

from experiments.common import Row, facts, in_processes, parser_of, run_script
from moesaic import (
    Architecture,
    Batch,
    BudgetSearch,
    Config,
    Context,
    DeviceConfig,
    Evaluation,
    Executor,
    ExecutorConfig,
    FeasibleSampler,
    Genome,
    Judge,
    LocalExecutor,
    Mirror,
    Outcome,
    Pricer,
    RayExecutor,
    SearchConfig,
    Transformer,
    Trial,
    TrialLog,
    TuneExecutor,
    choose_device,
    evaluate_all,
    find_feasible,
    make_sampler,
    resolve_budget,
    run_search,
    write_value,
)
from moesaic.search_spaces import load_space, preset_source

HERE = Path(__file__).parent
SEED, VOCABULARY, WINDOWS, LENGTH = 0, 1024, 64, 128
SPACE = load_space(preset_source("small"))
DEVICE = DeviceConfig(device="cpu", threads=1)
PRIVATE = re.compile(r"^Private_(?:Clean|Dirty): +(\d+) kB", re.MULTILINE)
"""Matches private memory in ``/proc/PID/smaps_rollup``."""


def search(
    executor: Executor, trials: int, sampler: str = "evolution", on_trial: Callable[[], None] = lambda: None
) -> tuple[float, list[Trial]]:
    """Seconds of a complete search, and its trials."""
    config = SearchConfig.model_validate({"sampler": sampler, "trials": trials})
    pricer = Pricer(Context(VOCABULARY, LENGTH, 8))
    budget = resolve_budget(Config.model_validate({"budget": {"flops": "60%"}}).budget, SPACE, pricer)
    feasible = FeasibleSampler(SPACE, budget, find_feasible(SPACE, budget))
    with tempfile.TemporaryDirectory() as folder, closing(TrialLog(Path(folder) / "trials.jsonl")) as log:
        own = BudgetSearch("", budget, partial(make_sampler, config, feasible, SEED))
        started = time.perf_counter()
        file = str(Path(folder) / "journal.log")
        opened = partial(JournalStorage, JournalFileBackend(file))
        with Mirror(opened, "bench", ["loss", "flops"], Genome(SPACE), log.trials, print) as mirror:

            def mirrored(finished: list[Trial]) -> None:
                mirror.append(finished)
                on_trial()

            run_search(config, [own], executor, log, SEED, mirrored)
        return time.perf_counter() - started, log.trials


@contextmanager
def cluster_of(nodes: int) -> Iterator[str]:
    """The address of a cluster on this machine: a head without processors, and nodes with one each."""
    cluster = Cluster()
    cluster.add_node(num_cpus=0)
    for _ in range(nodes):
        cluster.add_node(num_cpus=1)
    try:
        yield str(cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()


def timed(executor: Executor, trials: int) -> Row:
    """Figures of one search, after a first evaluation in every lane."""
    search(executor, 2 * executor.lanes)
    seconds, found = search(executor, trials)
    evaluated = [trial for trial in found if trial.state == "evaluated"]
    inside = sum(trial.seconds for trial in evaluated)
    return {
        "lanes": executor.lanes,
        "seconds": round(seconds, 3),
        "evaluations_per_second": round(len(evaluated) / seconds, 3),
        "evaluation_ms": round(1e3 * inside / len(evaluated), 2),
        "engine_ms_per_evaluation": round(1e3 * (seconds * executor.lanes - inside) / len(evaluated), 2),
    }


def random_judge() -> Judge:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    model = Transformer(SPACE.envelope, VOCABULARY).eval()
    windows = torch.randint(0, VOCABULARY, (WINDOWS, LENGTH + 1))
    return Judge(model, Batch(windows[:, :-1], windows[:, 1:]))


def bare_evaluations(count: int, start: Any) -> float:
    """Milliseconds per evaluation over ``count`` evaluations without the engine, after the barrier ``start``."""
    judge, rng = random_judge(), Random(SEED)
    architectures = [SPACE.sample_balanced(rng) for _ in range(count)]
    judge(architectures[0])
    start.wait()
    started = time.perf_counter()
    for architecture in architectures:
        judge(architecture)
    return 1e3 * (time.perf_counter() - started) / count


def ceiling(count: int) -> float:
    """How close two independent processes come to twice the speed of one on this machine, as a share."""
    times = []
    with multiprocessing.get_context("spawn").Manager() as manager:
        for processes in (1, 2):
            start = manager.Barrier(processes)
            jobs = {number: (count, start) for number in range(processes)}
            times.append(statistics.mean(job.result() for _, job in in_processes(bare_evaluations, jobs, processes)))
    return times[0] / times[1]


class Timed:
    """Given architectures as work of an executor, and when each ended."""

    def __init__(self, architectures: list[Architecture]):
        self._left = iter(architectures)
        self.ends: list[float] = []
        self.inside: list[float] = []

    def ask(self) -> Architecture | None:
        return next(self._left, None)

    def tell(self, outcome: Outcome) -> None:
        assert outcome.evaluation is not None, outcome.reason
        self.ends.append(time.perf_counter())
        self.inside.append(outcome.seconds)


def measure_engines(trials: int, rounds: int) -> Row:
    """Milliseconds per evaluation in each executor, once all lanes have started; rounds of all executors in turn."""
    space, rng = load_space(preset_source("tiny")), Random(SEED)
    torch.set_num_threads(1)
    judge = Judge(Transformer(space.envelope, 64).eval(), Batch(*2 * (torch.zeros((1, 8), dtype=torch.int64),)))
    architectures = [space.sample_balanced(rng) for _ in range(trials)]
    rows: list[Row] = []
    for _ in range(rounds):
        for kind, lanes in _ENGINES:
            with closing(executor_of(kind, lanes, judge)) as executor:
                executor.run(work := Timed(architectures))
            quarter = trials // 4
            parts = [work.ends[at + quarter - 1] - work.ends[at] for at in (quarter, trials - quarter)]
            second, last = (1e3 * part / (quarter - 1) for part in parts)
            row: Row = {"executor": kind, "lanes": lanes, "evaluation_ms": round(1e3 * statistics.mean(work.inside), 2)}
            rows.append({**row, "ms_second_quarter": round(second, 2), "ms_last_quarter": round(last, 2)})
            print(rows[-1], flush=True)
    medians = {
        f"{kind}, lanes {lanes}": statistics.median(
            row["ms_last_quarter"] for row in rows if (row["executor"], row["lanes"]) == (kind, lanes)
        )
        for kind, lanes in _ENGINES
    }
    return {"trials": trials, "ms_per_evaluation": medians, "rounds": rows}


Kind = Literal["local", "ray", "tune"]
_ENGINES: tuple[tuple[Kind, int], ...] = (("local", 1), ("ray", 1), ("ray", 2), ("tune", 1), ("tune", 2))


def executor_of(kind: Kind, lanes: int, judge: Judge) -> Executor:
    if kind == "local":
        return LocalExecutor(judge)
    executor = RayExecutor if kind == "ray" else TuneExecutor
    return executor(ExecutorConfig(kind=kind, lanes=lanes), judge, DEVICE)


def measure_lanes(trials: int, rounds: int) -> Row:
    """Rounds of all ways in turn, so that slow minutes of the machine affect all of them."""
    judge = random_judge()
    rows: list[Row] = []
    ceilings: list[float] = []

    def note(way: str, executor: Executor) -> None:
        with closing(executor):
            rows.append({"way": way, **timed(executor, trials)})
        print(rows[-1], flush=True)

    for _ in range(rounds):
        note("this process", LocalExecutor(judge))
        for lanes in (1, 2):
            note(f"Ray, lanes {lanes}", executor_of("ray", lanes, judge))
        for lanes in (1, 2):
            note(f"Ray Tune, lanes {lanes}", executor_of("tune", lanes, judge))
        ceilings.append(ceiling(trials // 2))
        print("of two bare processes", round(ceilings[-1], 3), flush=True)
    with cluster_of(4) as address:
        config = ExecutorConfig(kind="ray", lanes=4, address=address)
        note("Ray, cluster of 4 nodes on these 2 processors", RayExecutor(config, judge, DEVICE))

    def median(way: str, key: str) -> float:
        return statistics.median(row[key] for row in rows if row["way"] == way)

    ways = list(dict.fromkeys(row["way"] for row in rows))
    one, two = (median(f"Ray, lanes {lanes}", "evaluations_per_second") for lanes in (1, 2))
    keys = ("evaluations_per_second", "engine_ms_per_evaluation")
    medians = {way: {key: median(way, key) for key in keys} for way in ways}
    return {
        "trials": trials,
        "medians": medians,
        "efficiency_of_two_lanes": round(two / (2 * one), 3),
        "efficiency_of_two_bare_processes": round(statistics.median(ceilings), 3),
        "rounds": rows,
    }


def measure_memory() -> list[Row]:
    """Private memory in MB of each of two lanes after both have evaluated, for supernets with small and large
    embeddings."""
    rows, token = [], torch.zeros((1, 1), dtype=torch.int64)
    for vocabulary in (1_000, 200_000):
        model = Transformer(SPACE.envelope, vocabulary).eval()
        executor = RayExecutor(ExecutorConfig(kind="ray", lanes=2), Judge(model, Batch(token, token)), DEVICE)
        with closing(executor):
            seen: set[int] = set()
            while len(seen) < executor.lanes:
                seen |= {outcome.lane for outcome in evaluate_all(executor, [SPACE.smallest, SPACE.largest])}
            lanes = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if b"ray::Lane" in path.read_bytes()]
            private = [sum(map(int, PRIVATE.findall((lane / "smaps_rollup").read_text()))) / 1024 for lane in lanes]
        weights = sum(4 * parameter.numel() for parameter in model.parameters()) / 2**20
        rows.append({"weights_mb": round(weights, 1), "private_mb": [round(one, 1) for one in private]})
        print(rows[-1], flush=True)
    return rows


def formula(architecture: Architecture) -> Evaluation:
    """A loss that falls with active neurons, with diminishing returns."""
    layers = architecture.layers.values()
    active = sum(layer.feed_forward.worst_active_neurons for layer in layers)
    loss = 3 + 20 / architecture.output.width + 100 / (100 + active)
    return Evaluation(loss, 0.01, 1000, tuple(None for _ in layers))


def measure_length(trials: int) -> Row:
    """Engine time per trial in milliseconds, over the last tenth before each number of trials."""
    found = {}
    for sampler in ("random", "evolution"):
        ends: list[float] = []
        search(LocalExecutor(formula), trials, sampler, lambda ends=ends: ends.append(time.perf_counter()))
        marks = [n for n in (100, 300, 1000, 3000, 10000) if n <= trials]
        found[sampler] = {n: round(1e3 * (ends[n - 1] - ends[n - n // 10 - 1]) / (n // 10), 2) for n in marks}
        print(sampler, found[sampler], flush=True)
    return {"trials": trials, "ms_per_trial_at": found}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=["engines", "lanes", "length", "memory"])
    parser.add_argument("--trials", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the result")
    chosen = parser.parse_args()
    result: Row
    if chosen.what == "engines":
        result = measure_engines(chosen.trials or 1000, chosen.rounds or 3)
    elif chosen.what == "lanes":
        result = measure_lanes(chosen.trials or 200, chosen.rounds or 5)
    elif chosen.what == "memory":
        result = {"supernets": measure_memory()}
    else:
        result = measure_length(chosen.trials or 10_000)
    write_value(chosen.out / f"{chosen.what}.json", {**facts(choose_device(DEVICE)), "seed": SEED, **result})


if __name__ == "__main__":
    run_script(main)
