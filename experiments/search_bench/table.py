"""Make the exhaustive table of a small space: loss and routing of every architecture with one supernet's weights.

python -m experiments.search_bench.table moe|heads

Trains the supernet in ``runs/NAME`` and writes ``NAME.csv.gz``, a row per architecture in the order of the space.
Existing results are not repeated. Searches are replayed from the table without the model.
"""

from __future__ import annotations

import csv
import gzip
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.common import digest, do_stage, facts, parser_of, run_script
from moesaic import (
    Architecture,
    Budget,
    Context,
    Evaluation,
    MoesaicError,
    Occupancy,
    OccupancyRow,
    Pricer,
    Run,
    SearchSpace,
    load_config,
    open_run,
    read_value,
    resolve_budget,
    write_value,
)
from moesaic.supernet import LayerLoad, evaluate

HERE = Path(__file__).parent
TABLES = ("moe", "heads")
COLUMNS = ("loss", "standard_error", "loss_quarter", "loss_sixteenth", "loads")
"""``loss_quarter`` is the mean over every fourth window, ``loads`` are the pairs per token of each layer's experts."""


@dataclass(frozen=True)
class TableFacts:
    """How a table was made. ``space`` is the digest of its members; each was evaluated on ``tokens`` tokens."""

    space: str
    architectures: int
    tokens: int
    context: Context
    occupancy: list[OccupancyRow]
    evaluation_seconds: float
    seed: int
    date: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Table:
    """Every member of a small space with its evaluation; ``budget`` is that of the YAML."""

    space: SearchSpace
    evaluations: dict[Architecture, Evaluation]
    budget: Budget

    def __call__(self, architecture: Architecture) -> Evaluation:
        return self.evaluations[architecture]


def evaluate_all(run: Run, path: Path) -> float:
    """Append the rows that ``path`` lacks; an incomplete last row is redone. Returns processor seconds of new rows."""
    rows = path.read_text().split("\n")[:-1] if path.exists() else []
    path.write_text("".join(row + "\n" for row in rows))
    batch = run.task.held_out("validation", run.config.search.evaluation_windows)
    started = time.process_time()
    with path.open("a", encoding="utf-8") as file:
        for number, architecture in enumerate(run.space):
            if number >= len(rows):
                file.write(row_of(evaluate(run.supernet, batch, architecture, rows=len(batch))) + "\n")
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
    """The table ``name``. Raises MoesaicError if it is not of the space of its YAML."""
    loaded, made = load_config(HERE / f"{name}.yaml"), read_value(HERE / f"{name}.json", TableFacts)
    path = HERE / f"{name}.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    members = list(loaded.space)
    if made.space != members_digest(members) or len(rows) != len(members):
        nearest = f"python -m experiments.search_bench.table {name}"
        raise MoesaicError("is a table of another space", where=str(path), nearest=nearest)
    evaluations = {a: _evaluation(row, made.tokens) for a, row in zip(members, rows, strict=True)}
    pricer = Pricer(made.context, Occupancy.of(made.occupancy))
    return Table(loaded.space, evaluations, resolve_budget(loaded.config.budget, loaded.space, pricer))


def members_digest(members: list[Architecture]) -> str:
    return digest({"members": [a.fingerprint for a in members]})


def _evaluation(row: dict[str, str], tokens: int) -> Evaluation:
    loads = tuple(LayerLoad(tuple(map(float, text.split()))) if text else None for text in row["loads"].split("|"))
    return Evaluation(float(row["loss"]), float(row["standard_error"]), tokens, loads)


def write_table(run: Run, rows: Path, name: str, seconds: float) -> None:
    text = ",".join(COLUMNS) + "\n" + rows.read_text()
    (HERE / f"{name}.csv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    made = TableFacts(
        space=members_digest(list(run.space)),
        architectures=run.space.cardinality,
        tokens=run.config.search.evaluation_windows * run.config.data.sequence_length,
        context=run.context,
        occupancy=measured_occupancy(run),
        evaluation_seconds=round(seconds, 1),
        seed=run.config.seed,
        **facts(run.device),
    )
    write_value(HERE / f"{name}.json", made)


def measured_occupancy(run: Run) -> list[OccupancyRow]:
    """How the routers of a trained supernet load their experts."""
    return read_value(run.folder("supernet").path / "occupancy.json", list[OccupancyRow])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("table", choices=TABLES)
    name = parser.parse_args().table
    run = open_run(HERE / f"{name}.yaml", out=HERE / "runs" / name)
    do_stage(run, "supernet")
    rows = run.path / "table.csv"
    write_table(run, rows, name, evaluate_all(run, rows))


if __name__ == "__main__":
    run_script(main)
