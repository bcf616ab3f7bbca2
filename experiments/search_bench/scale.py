"""What one step of a search costs in a space as large as today's largest mixtures, without training anything.

python -m experiments.search_bench.scale [--members 30] [--out FILE]

Width 4,096, 64 layers, 256 experts, vocabulary 131,072. Milliseconds of processor time, median over members; members
and their parts are new each time, so that no cache helps. `plan_seconds` is what `moesaic plan` asks of the space:
1,000 members priced, the range of every cost, and a member inside the budget.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from experiments.common import Row, facts, parser_of, run_script
from moesaic import (
    Budget,
    Config,
    Context,
    DeviceConfig,
    FeasibleSampler,
    Pricer,
    SearchSpace,
    choose_device,
    cost_ranges,
    find_feasible,
    resolve_budget,
    write_value,
)
from moesaic.search_spaces import crossover, load_space, mutate, neighbours, read_yaml

SEED, PLANNED = 0, 1000
SPACE = Path(__file__).with_name("scale.yaml")
CONTEXT = Context(131_072, 4096, 1)
BUDGETS = {
    "loose": {"flops": "45%"},
    "tight": {"flops": "15%", "parameters": "4%"},
    "very tight": {"flops": "10%", "parameters": "3%"},
}


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of processor time, and the result."""
    started = time.process_time()
    found = work()
    return 1e3 * (time.process_time() - started), found


def median(count: int, prepare: Callable[[], Any], work: Callable[[Any], Any]) -> float:
    """Median milliseconds of ``work`` on what ``prepare`` makes, which is not timed."""
    prepared = (prepare() for _ in range(count))
    return round(statistics.median(clock(partial(work, one))[0] for one in prepared), 2)


def planned(space: SearchSpace, budget: Budget) -> None:
    pricer, rng = budget.pricer, Random(SEED)
    cost_ranges(space, pricer, [space.sample_balanced(rng) for _ in range(PLANNED)])
    find_feasible(space, budget)


def figures(space: SearchSpace, context: Context, members: int) -> Row:
    rng, pricer = Random(SEED), Pricer(context)

    def draw():
        return space.sample_balanced(rng)

    rows: Row = {
        "sample": median(members, lambda: None, lambda _: space.sample(rng)),
        "sample_balanced": median(members, lambda: None, lambda _: draw()),
        "price": median(members, draw, pricer.expected),
        "price_worst": median(members, draw, pricer.worst),
        "fingerprint": median(members, draw, lambda a: a.fingerprint),
        "mutate": median(members, draw, lambda a: mutate(space, a, rng)),
        "crossover": median(members, lambda: (draw(), draw()), lambda pair: crossover(space, pair[0], pair[1], rng)),
        "neighbours": median(members, draw, lambda a: neighbours(space, a)),
        "count_of_neighbours": statistics.median(len(neighbours(space, draw())) for _ in range(members)),
    }
    for name, lines in BUDGETS.items():
        budget = resolve_budget(Config.model_validate({"budget": lines}).budget, space, Pricer(context))
        feasible = FeasibleSampler(space, budget, find_feasible(space, budget))
        setup, _ = clock(lambda feasible=feasible: feasible.sample(rng))
        rows[name] = {
            "share_inside": feasible.acceptance(10 * members, rng),
            "first_draw_ms": round(setup),
            "draw": median(members, lambda: None, lambda _, feasible=feasible: feasible.sample(rng)),
            "repair": median(members, draw, lambda a, feasible=feasible: feasible.repair(a, rng)),
        }
        rows["plan_seconds"] = round(clock(partial(planned, space, budget))[0] / 1e3, 2)
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--members", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("scale.json"))
    chosen = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loading, space = clock(lambda: load_space(read_yaml(SPACE)))
    rows = {"load_space": round(loading, 2), **figures(space, CONTEXT, chosen.members)}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    device = choose_device(DeviceConfig(device="cpu", threads=1))
    result = {**facts(device), "seed": SEED, "members": chosen.members, "memory_mb": round(grown), **rows}
    write_value(chosen.out, result)
    for name, value in rows.items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    run_script(main)
