"""The command line's work as functions for programs: run, plan, load and translate."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from moesaic.nas.config import load_config
from moesaic.nas.data.cache import expanded
from moesaic.nas.exports.folder import load_exported
from moesaic.nas.exports.translate import load_translator, translate_lines
from moesaic.nas.pipeline import run_stages
from moesaic.nas.plan import Plan, build_plan
from moesaic.nas.report.summary import Summary
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.write_report import load_summary
from moesaic.nas.tasks.translator import Decoding
from moesaic.nas.terminal.progress import Reporter
from moesaic.search_spaces.files import PathLike
from moesaic.supernet import Transformer


def open_run(
    config: PathLike,
    overrides: Sequence[str] = (),
    out: PathLike | None = None,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    tune_callbacks: Sequence[Any] = (),
) -> Run:
    """A run: call its stages one by one, read its artifacts as properties.

    Parameters
    ----------
    config : YAML file of the run.
    overrides : ``KEY=VALUE`` settings, such as ``search.trials=50``.
    out : directory of the run; by default ``runs/NAME``.
    reporter : receives messages and progress; by default they go to standard error.
    should_stop : polled regularly; True saves the work done so far and raises Interrupted.
    tune_callbacks : objects of ``ray.tune.Callback`` for ``executor.kind=tune``.

    Raises
    ------
    MoesaicError : the configuration is wrong, with file, line and key.
    """
    loaded = load_config(config, overrides)
    path = expanded(os.fspath(out), "out") if out is not None else Path("runs") / loaded.config.name
    return Run(loaded, path, reporter or Reporter(), should_stop, tune_callbacks)


def run(
    config: PathLike, overrides: Sequence[str] = (), out: PathLike | None = None, tune_callbacks: Sequence[Any] = ()
) -> dict[str, Summary]:
    """Run all stages, as ``moesaic run``; continues where it stopped. Returns the findings by budget name (a single
    budget has an empty name). ``tune_callbacks`` as in ``open_run``.

    Raises
    ------
    MoesaicError : as ``open_run``, and where a stage fails.
    """
    opened = open_run(config, overrides, out, tune_callbacks=tune_callbacks)
    run_stages(opened, Console(file=io.StringIO()))
    return {part.name: load_summary(part) for part in opened.budgets}


def plan(config: PathLike, overrides: Sequence[str] = (), latency: bool = False) -> dict[str, Plan]:
    """The plan of each budget by name, without training, as ``moesaic plan``; ``latency`` times this machine."""
    return {part.name: build_plan(part, latency) for part in open_run(config, overrides).budgets}


def load(folder: PathLike) -> Transformer:
    """Load an exported model on the CPU, in evaluation mode. No code from the folder is executed.

    Raises
    ------
    MoesaicError : the folder is not an export or is damaged, or the weights do not fit the architecture.
    """
    return load_exported(folder)


def translate(
    folder: PathLike, lines: Iterable[str], beam: int = 4, length_penalty: float = 0.6, batch_size: int = 32
) -> Iterator[str]:
    """The translation of each of ``lines`` by an exported model, as ``moesaic translate``: read and translated
    ``batch_size`` at a time, with a search of ``beam`` hypotheses.

    Raises
    ------
    MoesaicError : the folder is not an export that translates; a line has more tokens than the model was trained on.
    """
    return translate_lines(*load_translator(Path(folder), Decoding(beam, length_penalty, batch_size)), lines)
