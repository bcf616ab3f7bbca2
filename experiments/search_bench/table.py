"""The exhaustive table of a small space: every architecture's loss and routing with the weights of one supernet.

python experiments/search_bench/table.py moe|heads

Trains the supernet in ``runs/NAME`` and writes ``NAME.csv.gz``, a row per architecture in the order of the space. What
is done is not repeated. A search is replayed from the table without the model.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesaic.nas.config import load_config
from moesaic.nas.context import Context
from moesaic.nas.costs.price import Pricer
from moesaic.nas.costs.use import Occupancy
from moesaic.nas.report.summary import versions
from moesaic.nas.search.budget import Budget, resolve_budget
from moesaic.nas.stages.directory import fingerprint
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.train_supernet import run_supernet
from moesaic.search_spaces import Architecture, MoesaicError, SearchSpace
from moesaic.search_spaces.files import read_json, write_atomically, write_json
from moesaic.supernet import Evaluation, LayerLoad, evaluate

HERE = Path(__file__).parent
TABLES = ("moe", "heads")
COLUMNS = ("loss", "standard_error", "loss_quarter", "loss_sixteenth", "loads")
"""``loss_quarter`` is the mean over every fourth window, ``loads`` the pairs per token of each layer's experts."""


@dataclass(frozen=True)
class Table:
    """Every member of a small space with its evaluation; ``budget`` is that of the YAML, ``facts`` how it was made."""

    space: SearchSpace
    evaluations: dict[Architecture, Evaluation]
    fewer_windows: np.ndarray
    budget: Budget
    facts: dict

    def __call__(self, architecture: Architecture) -> Evaluation:
        return self.evaluations[architecture]


def open_run(name: str) -> Run:
    return Run(load_config(HERE / f"{name}.yaml"), HERE / "runs" / name)


def evaluate_all(run: Run, path: Path) -> float:
    """Append the rows that ``path`` lacks; a row cut off by a kill is made again. Processor seconds of the new ones."""
    rows = path.read_text().split("\n")[:-1] if path.exists() else []
    path.write_text("".join(row + "\n" for row in rows))
    windows = run.windows("validation", run.config.search.evaluation_windows)
    started = time.process_time()
    with path.open("a", encoding="utf-8") as file:
        for number, architecture in enumerate(run.space):
            if number >= len(rows):
                file.write(row_of(evaluate(run.supernet, windows, architecture, batch_size=len(windows))) + "\n")
                file.flush()
            if number % 500 == 0:
                print(f"{number} of {run.space.cardinality}", flush=True)
    return time.process_time() - started


def row_of(evaluation: Evaluation) -> str:
    losses = np.array(evaluation.sequence_losses)
    loads = "|".join(
        "" if load is None else " ".join(f"{p:.4f}" for p in load.pairs_per_token) for load in evaluation.loads
    )
    values = (evaluation.loss, evaluation.standard_error, losses[::4].mean(), losses[::16].mean())
    return ",".join([*(f"{value:.5f}" for value in values), loads])


def read_table(name: str) -> Table:
    """Raises MoesaicError where the table is not of the space of its YAML."""
    loaded, facts = load_config(HERE / f"{name}.yaml"), read_json(HERE / f"{name}.json")
    path = HERE / f"{name}.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    members = list(loaded.space)
    if facts["space"] != members_digest(members) or len(rows) != len(members):
        raise MoesaicError("is a table of another space", where=str(path), nearest=f"table.py {name}")
    evaluations = {a: _evaluation(row, facts["tokens"]) for a, row in zip(members, rows, strict=True)}
    fewer = np.array([[float(row[column]) for column in ("loss_quarter", "loss_sixteenth")] for row in rows])
    pricer = Pricer(Context(**facts["context"]), Occupancy.from_rows(facts["occupancy"]))
    return Table(loaded.space, evaluations, fewer, resolve_budget(loaded.config, loaded.space, pricer), facts)


def members_digest(members: list[Architecture]) -> str:
    return fingerprint({"members": [a.fingerprint for a in members]})


def _evaluation(row: dict[str, str], tokens: int) -> Evaluation:
    loads = tuple(LayerLoad(tuple(map(float, text.split()))) if text else None for text in row["loads"].split("|"))
    return Evaluation(float(row["loss"]), float(row["standard_error"]), tokens, loads)


def write_table(run: Run, rows: Path, name: str, seconds: float) -> None:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:
        file.write((",".join(COLUMNS) + "\n" + rows.read_text()).encode())
    write_atomically(HERE / f"{name}.csv.gz", lambda path: path.write_bytes(buffer.getvalue()))
    context = run.context
    facts = {
        "space": members_digest(list(run.space)),
        "architectures": run.space.cardinality,
        "tokens": run.config.search.evaluation_windows * run.config.data.sequence_length,
        "context": {
            "vocab_size": context.vocab_size,
            "sequence_length": context.sequence_length,
            "batch_size": context.batch_size,
        },
        "occupancy": read_json(run.stages["supernet"].path / "occupancy.json"),
        "evaluation_seconds": round(seconds, 1),
        "seed": run.config.seed,
        "date": time.strftime("%Y-%m-%d"),
        "device": str(run.device),
        "versions": versions(),
    }
    write_json(HERE / f"{name}.json", facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    name = parser.parse_args().table
    run = open_run(name)
    run_supernet(run)
    rows = run.path / "table.csv"
    seconds = evaluate_all(run, rows)
    write_table(run, rows, name, seconds)


if __name__ == "__main__":
    main()
