"""The definition and the list of stages. Imports nothing heavy, because every command imports it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One stage of a run, and the command of its name.

    ``module``, in this folder, has two functions. ``inputs(run)`` gives what decides the result, besides the results
    of the stages that it ``needs``. ``work(run, directory)`` writes the stage's files to ``directory.path`` and returns
    a digest of the result, or None where the inputs alone identify it. A long stage has a third, ``passes(run)``, for
    an estimate of its time. ``run`` is the ``Run`` for a stage that all budgets share (``shared``), else the
    ``BudgetRun``. A change of ``extendable`` inputs keeps earlier work; later stages do not depend on ``private`` ones.
    """

    name: str
    module: str
    help: str
    needs: tuple[str, ...] = ()
    shared: bool = False
    extendable: tuple[str, ...] = ()
    private: tuple[str, ...] = ()
    folder: str = ""
    """The folder of its files, where that differs from the name."""

    def inputs(self, run: Any) -> dict[str, Any]:
        return self._module.inputs(run)

    def work(self, run: Any, directory: Any) -> str | None:
        return self._module.work(run, directory)

    def passes(self, run: Any) -> float:
        """About how many sequences pass forward through a model; each that trains counts as three. 0: takes little."""
        return getattr(self._module, "passes", lambda run: 0.0)(run)

    @property
    def folder_name(self) -> str:
        return self.folder or self.name

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
        extendable=("search.trials", "budgets.*", "mirror"),
        private=("mirror",),
    ),
    Stage("fidelity", "check_fidelity", "Test how far the search's ranking can be trusted.", needs=("search",)),
    Stage(
        "export",
        "export_models",
        "Write the best architecture and the Pareto front as separate models, and measure them.",
        needs=("search", "fidelity"),
        extendable=("retrain_file",),
        private=("retrain_file",),
        folder="exports",
    ),
    Stage(
        "retrain",
        "retrain_models",
        "Train the chosen architecture and its rivals, or one exported model.",
        needs=("export",),
        extendable=("retrain.seeds", "questions"),
    ),
    Stage("report", "write_report", "Write the report of a finished run.", needs=("fidelity", "retrain")),
)
"""All stages in order. A new stage is a module and a line here."""
BY_NAME = {stage.name: stage for stage in STAGES}


def before(stage: Stage) -> list[Stage]:
    """All stages that must be complete before ``stage``, in their order."""
    needed = {name for direct in stage.needs for name in (direct, *(other.name for other in before(BY_NAME[direct])))}
    return [other for other in STAGES if other.name in needed]
