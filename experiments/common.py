"""Shared by the scripts: facts of a result, tables that grow row by row, work in processes, Markdown.

Scripts are modules: ``python -m experiments.pricing.run``, from the root of the repository.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

import moesaic
from moesaic import MoesaicError, Run, versions

DOCS = Path(__file__).parents[1] / "docs"
Row = dict[str, Any]
Key = TypeVar("Key")
Result = TypeVar("Result")


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """A parser that shows the docstring of a script unchanged."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def arguments_of(text: str | None, out: str) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of a script on a trained model, ``MODEL TRAIN VALIDATION TEST [--out] [KEY=VALUE]...``, and the
    settings of its run."""
    parser = parser_of(text)
    for name in ("model", "train", "validation", "test"):
        parser.add_argument(name, type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path(out))
    arguments = parser.parse_args()
    files = ", ".join(f"{split}: '{getattr(arguments, split)}'" for split in ("train", "validation", "test"))
    return arguments, [f"model.from={arguments.model}", f"data.files={{{files}}}", *arguments.settings]


def run_script(main: Callable[[], None]) -> None:
    """Run a script. An error that the user can fix is printed as a message, without traceback."""
    try:
        main()
    except MoesaicError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def today() -> str:
    return datetime.date.today().isoformat()


def facts(device: object) -> Row:
    """Date, device and versions, which every result records."""
    return {"date": today(), "device": str(device), "versions": versions()}


def digest(values: Row) -> str:
    """16 hexadecimal digits that identify ``values``."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def read_rows(path: Path) -> list[Row]:
    """The rows of a table with a JSON record per line; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append_row(path: Path, row: Row) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def in_processes(
    work: Callable[..., Result], jobs: Mapping[Key, tuple], lanes: int
) -> Iterator[tuple[Key, Future[Result]]]:
    """Call ``work`` with the arguments of each job, ``lanes`` at a time, each in a process. Yields jobs as they
    end, by key."""
    with ProcessPoolExecutor(lanes, mp_context=multiprocessing.get_context("spawn")) as pool:
        keys = {pool.submit(work, *arguments): key for key, arguments in jobs.items()}
        for future in as_completed(keys):
            yield keys[future], future


def do_stage(run: Run, name: str) -> None:
    """Run one stage of a run unless it is complete."""
    moesaic.run_stages(run, Console(stderr=True), only=name)  # brings Optuna, which not every script has


def markdown(columns: str, rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. ``columns`` are names separated by ``|``."""
    names = columns.split("|")
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (names, ["---"] * len(names), *rows))
