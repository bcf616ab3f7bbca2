"""Runs a stage: skips it when complete, continues it when interrupted, starts again when its inputs changed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from moesaic.nas.stages.directory import RunDirectory, stopwatch
from moesaic.nas.stages.provenance import describe
from moesaic.nas.stages.run import BudgetRun, Run
from moesaic.nas.stages.stage import STAGES, Stage, before
from moesaic.nas.terminal.progress import duration
from moesaic.search_spaces import Damaged, MoesaicError


def do(stage: Stage, run: Run | BudgetRun) -> None:
    """Run a stage, unless it is complete.

    Raises
    ------
    MoesaicError : an earlier stage is not complete; or as the stage's work.
    """
    directory, say = run.folder(stage.name), run.reporter.say
    if directory.complete:
        say(f"{stage.name}: complete, skipped")
        return
    require(run, before(stage), stage.name)
    prepared = RunDirectory(run.path).prepare(directory, stage.extendable)
    if prepared.changes:
        again = "continues" if prepared.continues else "runs again; what was there moved to previous/"
        say(f"{stage.name}: {again}, because {'; '.join(map(str, prepared.changes))}")
    elif prepared.continues:
        say(f"{stage.name}: continues where it stopped")
    describe(run, stage.name)
    with stopwatch() as seconds:
        digest = stage.work(run, directory)
    total = seconds[0] + run.spent_ahead.pop(stage.name, 0.0)
    directory.finish(total, prepared.continues, digest)
    run.forget_folders()  # this result is an input of later stages
    say(f"{stage.name}: done in {duration(total)}")


def require(run: Run | BudgetRun, stages: list[Stage], for_what: str) -> None:
    """Raises MoesaicError with the command for the first of ``stages`` that is not complete."""
    for stage in stages:
        directory = run.folder(stage.name)
        if not directory.settled:
            raise MoesaicError(
                f"{for_what} needs stage {stage.name}, which is not complete for this configuration",
                where=str(directory.path),
                nearest=run.command(stage.name),
            )


@contextmanager
def remedied(run: Run) -> Iterator[None]:
    """Tell of a damaged file of a stage with the command that makes it again."""
    try:
        yield
    except Damaged as error:
        tops = (run.path, *(part.path for part in run.budgets))
        folders = [top / stage.folder_name for top in tops for stage in STAGES]
        folder = next((folder for folder in folders if folder in error.path.parents), None)
        if folder is None or error.nearest is not None:
            raise
        aside = shlex.join(["mv", str(folder), f"{folder}.damaged"])
        raise MoesaicError(
            error.problem,
            where=error.where,
            found=error.found,
            allowed=error.allowed,
            nearest=f"{aside} && {run.command('run')}",
        ) from None
