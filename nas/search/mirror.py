"""The trial log as an Optuna journal, so that ``optuna-dashboard`` opens a search while it runs."""

from __future__ import annotations

import warnings
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection

from nas.search.genome import Genome
from nas.search.optuna_sampler import frozen_trial
from nas.search.trials import Trial


class JournalMirror:
    """Writes finished trials to ``path``; the journal is made again from the log when they differ."""

    def __init__(self, path: Path, name: str, objectives: list[str], genome: Genome, trials: list[Trial]):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.genome = genome
        # A killed writer leaves its lock behind, which would block for 30 seconds; the run directory has one writer.
        Path(f"{path}.lock").unlink(missing_ok=True)
        study = self._open(path, name, objectives)
        if len(study.get_trials(deepcopy=False)) != len(trials):
            path.unlink()
            study = self._open(path, name, objectives)
            study.add_trials([frozen_trial(genome, trial) for trial in trials])
        self.study = study

    def append(self, trials: list[Trial]) -> None:
        self.study.add_trials([frozen_trial(self.genome, trial) for trial in trials])

    @staticmethod
    def _open(path: Path, name: str, objectives: list[str]) -> optuna.Study:
        storage = JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[StudyDirection.MINIMIZE] * len(objectives),
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(objectives)
        return study
