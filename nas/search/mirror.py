"""Copies the trial log into an Optuna study, in a journal file or a database, so that ``optuna-dashboard`` can show a
running search."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from sqlalchemy.exc import SQLAlchemyError

from moesaic.nas.search.samplers.genome import Genome
from moesaic.nas.search.samplers.optuna_sampler import frozen_trial
from moesaic.nas.search.trials import Trial
from moesaic.search_spaces import MoesaicError


class Mirror:
    """Writes trials in its own thread, so that a search never waits for storage (a database takes 0.1 s a trial).

    Missing ``trials`` are added to the study; a study with other trials is recreated. If the storage fails later, that
    is reported once and the next opening adds the rest, since the log has everything.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        objectives: Sequence[str],
        genome: Genome,
        trials: list[Trial],
        say: Callable[[str], None],
    ):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.genome, self._say = genome, say
        self._failure: str | None = None
        self.study = _study(storage, name, objectives)
        known = [trial.user_attrs["fingerprint"] for trial in self.study.get_trials(deepcopy=False)]
        if known != [trial.architecture.fingerprint for trial in trials[: len(known)]]:
            optuna.delete_study(study_name=name, storage=storage)
            self.study, known = _study(storage, name, objectives), []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror")
        self.append(trials[len(known) :])

    def append(self, trials: list[Trial]) -> None:
        for trial in trials:
            self._thread.submit(self._write, trial)
        self._tell()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        """Wait until everything is written, unless the search ends early."""
        try:
            self._thread.shutdown(wait=error is None, cancel_futures=error is not None)
        except KeyboardInterrupt:
            self._thread.shutdown(wait=False, cancel_futures=True)
            raise
        self._tell()

    def _write(self, trial: Trial) -> None:
        if self._failure is None:
            try:
                self.study.add_trial(frozen_trial(self.genome, trial))
            except (OSError, StorageInternalError, SQLAlchemyError) as error:
                self._failure = str(error.__cause__ or error).partition("\n")[0]

    def _tell(self) -> None:
        if self._failure:
            self._say(f"search: the study for optuna-dashboard stops here ({self._failure}); trials.jsonl continues")
            self._failure = ""  # reported; nothing more is written


def journal(path: Path) -> BaseStorage:
    # A killed writer leaves its lock behind, which would block for 30 seconds; the run directory has one writer.
    Path(f"{path}.lock").unlink(missing_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def database(url: str) -> BaseStorage:
    """The database at ``url``, for any number of runs. Raises MoesaicError if it does not answer or lacks a driver."""
    try:
        return RDBStorage(url)
    except (ImportError, StorageInternalError, SQLAlchemyError) as error:
        why = str(error.__cause__ or error).strip().partition("\n")[0]
        raise MoesaicError(
            "cannot open the database",
            where="mirror",
            found=f"{url} ({why})",
            allowed="a URL such as postgresql://USER@HOST/NAME or sqlite:///FILE, and the driver that it needs",
        ) from None


def _study(storage: BaseStorage, name: str, objectives: Sequence[str]) -> optuna.Study:
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        directions=[StudyDirection.MINIMIZE] * len(objectives),
        load_if_exists=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(objectives))
    return study
