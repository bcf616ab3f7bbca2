"""What a stage is, and the list of all of them. Imports nothing heavy: the command line reads it before it does
anything."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One stage of a run, and the command of its name.

    ``module``, in this folder, has two functions: ``inputs(run)``, what decides the result beside the results of the
    stages that it ``needs``; and ``work(run, directory)``, which leaves the stage's files in ``directory.path`` and
    returns what identifies a result that its inputs alone do not (None: they do). ``run`` is the ``Run`` where all
    budgets have the stage in common (``shared``), else the ``BudgetRun``. A change of ``extendable`` inputs keeps
    earlier work.
    """

    name: str
    module: str
    help: str
    needs: tuple[str, ...] = ()
    shared: bool = False
    extendable: tuple[str, ...] = ()
    folder: str = ""
    """Of its files, where that is not its name."""

    def inputs(self, run: Any) -> dict[str, Any]:
        return self._module.inputs(run)

    def work(self, run: Any, directory: Any) -> str | None:
        return self._module.work(run, directory)

    @property
    def _module(self) -> Any:
        return import_module(f"moesaic.nas.stages.{self.module}")


STAGES = (
    Stage("supernet", "train_supernet", "Train the weights that all architectures share.", shared=True),
    Stage("latency", "calibrate_latency", "Calibrate the latency predictor on this device.", shared=True),
    Stage(
        "search",
        "run_search",
        "Search for the best architectures inside the budget.",
        needs=("supernet", "latency"),
        shared=True,
        extendable=("search.trials", "budgets"),
    ),
    Stage("fidelity", "check_fidelity", "Test how far the search's ranking can be trusted.", needs=("search",)),
    Stage(
        "export",
        "export_models",
        "Write the best architecture and the Pareto set as models of their own, and measure them.",
        needs=("search", "fidelity"),
        folder="exports",
    ),
    Stage(
        "retrain",
        "retrain_models",
        "Train the chosen architecture and its rivals, or one exported model.",
        needs=("export",),
        extendable=("retrain.seeds",),
    ),
    Stage("report", "write_report", "Write the report of a finished run.", needs=("fidelity", "retrain")),
)
"""In the order in which they are done. A new stage is a module and a line here."""
BY_NAME = {stage.name: stage for stage in STAGES}


def before(stage: Stage) -> list[Stage]:
    """All stages that must be complete before ``stage``, in their order."""
    needed = {name for direct in stage.needs for name in (direct, *(other.name for other in before(BY_NAME[direct])))}
    return [other for other in STAGES if other.name in needed]
