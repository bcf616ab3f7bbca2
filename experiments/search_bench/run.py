"""Search the exhaustive tables with every method and say how many evaluations each needs.

python -m experiments.search_bench.run [--seeds 10]     searches that are not in curves.jsonl yet, then result.json

Searches are replayed from the tables of ``table.py``, without a model. Shares are of the true front's
hypervolume.
"""

from __future__ import annotations

import time

import numpy as np

from experiments.common import Row, append_row, facts, markdown, parser_of, read_rows, run_script
from experiments.search_bench.curves import Truth, needed, point, shares
from experiments.search_bench.large import CHOSEN, COUNT, best_known, read_points
from experiments.search_bench.methods import METHODS
from experiments.search_bench.table import HERE, TABLES, Table, read_table
from moesaic import DeviceConfig, choose_device, write_value

CURVES = HERE / "curves.jsonl"
LENGTHS = {
    "random": 2000,
    "AutoMoE's evolution": 1000,
    "Optuna's NSGA-II, plain": 1000,
    "Optuna's TPE, plain": 1000,
}
"""Evaluations of a search where they differ from ``LENGTH``."""
LENGTH = 342
"""Evaluations of the other searches: a twentieth of the first table."""
DETERMINISTIC = ("puzzle",)
"""Deterministic methods, which need one seed: in the tables puzzle scores every part of a layer."""
SHARES = (0.95, 0.98, 0.99)


def truth_of(table: Table) -> Truth:
    found = [point(table.budget, *pair) for pair in table.evaluations.items()]
    return Truth.of(np.array([one for one in found if one is not None]))


def search(table: Table, truth: Truth, name: str, method: str, seed: int) -> Row:
    """One row of curves.jsonl: the share after each evaluation that changed it."""
    started = time.process_time()
    asked = METHODS[method](table.space, table.budget, table, seed, LENGTHS.get(method, LENGTH))
    seconds = time.process_time() - started
    points = [point(table.budget, architecture, table(architecture)) for architecture in asked]
    history = shares(points, truth)
    steps = np.flatnonzero(np.diff(history, prepend=0.0) > 0)
    return {
        "table": name,
        "method": method,
        "seed": seed,
        "evaluations": len(asked),
        "outside": sum(one is None for one in points),
        "repeated": len(asked) - len(set(asked)),
        "seconds": round(seconds, 2),
        "curve": [[int(i) + 1, round(float(history[i]), 5)] for i in steps],
    }


def history_of(row: Row) -> np.ndarray:
    """[evaluations] the share after each evaluation."""
    history = np.zeros(row["evaluations"])
    for start, share in row["curve"]:
        history[start - 1 :] = share
    return history


def summary(rows: list[Row]) -> list[Row]:
    """A row per table and method: mean share after given numbers of evaluations, and the median number needed."""
    result = []
    for table, method in dict.fromkeys((row["table"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["table"], row["method"]) == (table, method)]
        histories = [history_of(row) for row in mine]
        counts = {share: float(np.median([needed(h, share) for h in histories])) for share in SHARES}
        at = [n for n in (100, 200, LENGTH) if n <= min(map(len, histories))]
        result.append(
            {
                "table": table,
                "method": method,
                "seeds": len(mine),
                "share": {n: float(np.mean([h[n - 1] for h in histories])) for n in at},
                "least": {n: float(np.min([h[n - 1] for h in histories])) for n in at},
                "needed": {f"{share:.0%}": None if np.isinf(n) else n for share, n in counts.items()},
                "searched": max(row["evaluations"] for row in mine),
                "outside": float(np.mean([row["outside"] / row["evaluations"] for row in mine])),
                "repeated": float(np.mean([row["repeated"] / row["evaluations"] for row in mine])),
                "milliseconds": float(np.median([row["seconds"] / row["evaluations"] for row in mine]) * 1e3),
            }
        )
    return result


def summary_large() -> list[Row]:
    """Shares of the best known hypervolume on the space of ``large.py``."""
    points = read_points()
    if not points:
        return []
    truth, result = best_known(points), []
    for method in CHOSEN:
        histories = [shares(found, truth) for (name, _), found in points.items() if name == method]
        if histories:
            losses = [
                min(one[0] for one in found if one is not None) for (m, _), found in points.items() if m == method
            ]
            at = {n: float(np.mean([h[n - 1] for h in histories])) for n in (100, 200, COUNT)}
            row = {"method": method, "seeds": len(histories), "share": at, "loss": float(np.mean(losses))}
            row["range"] = [float(f([h[-1] for h in histories])) for f in (np.min, np.max)]
            result.append(row)
    return result


def tables(result: list[Row]) -> str:
    """``summary`` as Markdown; ratios are relative to ``evolution``."""
    columns = (
        "table|method|share after 100|200|342|least of the seeds|evaluations to 95 %|98 %|99 %|ratio to 99 %|outside|ms"
    )
    lines = []
    for row in result:
        ours = next(r for r in result if r["table"] == row["table"] and r["method"] == "evolution")["needed"]["99%"]
        least, to_99 = row["least"].get(LENGTH), row["needed"]["99%"]
        cells = [row["table"], row["method"]]
        cells += [f"{row['share'][n]:.1%}" if n in row["share"] else "" for n in (100, 200, LENGTH)]
        cells += ["" if least is None else f"{least:.1%}"]
        cells += [f"{n:.0f}" if n else f"> {row['searched']}" for n in row["needed"].values()]
        cells += ["" if ours is None else f"{to_99 / ours:.1f}" if to_99 else f"> {row['searched'] / ours:.1f}"]
        lines.append([*cells, f"{row['outside']:.0%}", f"{row['milliseconds']:.0f}"])
    return markdown(columns, lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    done = {(row["table"], row["method"], row["seed"]) for row in read_rows(CURVES)}
    known = {name: read_table(name) for name in TABLES}
    truths = {name: truth_of(table) for name, table in known.items()}
    for method in arguments.methods:
        for name, table in known.items():
            for seed in range(1 if method in DETERMINISTIC else arguments.seeds):
                if (name, method, seed) not in done:
                    row = search(table, truths[name], name, method, seed)
                    append_row(CURVES, row)
                    print(f"{name} {method} seed {seed}: {row['curve'][-1]} {row['seconds']} s", flush=True)
    found = summary(read_rows(CURVES))
    about = {
        name: {
            "architectures": len(table.evaluations),
            "inside": sum(table.budget.fits(a) for a in table.evaluations),
            "front": len(truths[name].front),
            "reference": truths[name].reference.tolist(),
            "hypervolume": truths[name].volume,
        }
        for name, table in known.items()
    }
    result = {**facts(choose_device(DeviceConfig())), "tables": about, "methods": found, "large": summary_large()}
    write_value(HERE / "result.json", result)
    print(tables(found))


if __name__ == "__main__":
    run_script(main)
