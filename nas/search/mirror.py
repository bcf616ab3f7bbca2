"""Copies the trial log into an Optuna study, in a journal file or a database, so that ``optuna-dashboard`` can show a
running search."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection

from moesaic.nas.search.samplers.genome import Genome
from moesaic.nas.search.samplers.optuna_sampler import frozen_trial
from moesaic.nas.search.trials import Trial
from moesaic.search_spaces import Interrupted, MoesaicError

_PATIENCE_SECONDS = 30.0
"""How long a storage may take for one answer before it counts as lost."""
_LAST_SECONDS = 2.0
"""How long a search that stops waits for what is being written."""
_LOOK_SECONDS = 0.05
_MARK = "moesaic"


class Mirror:
    """Writes trials in its own thread, so that a search never waits for storage (a database takes 0.1 s a trial).

    Missing ``trials`` are added to the study ``name``; one with other trials is made again. A study of that name that
    this program did not make stays as it is, and the next free name is taken. If the storage cannot be opened, fails,
    or does not answer, that is said once; the next opening adds the rest, since the log has everything.
    """

    def __init__(
        self,
        open_storage: Callable[[], BaseStorage],
        name: str,
        objectives: Sequence[str],
        genome: Genome,
        trials: list[Trial],
        say: Callable[[str], None],
        should_stop: Callable[[], bool] = lambda: False,
    ):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._say, self._should_stop = say, should_stop
        self._failure: str | None = None
        self._told = False
        self._left: SimpleQueue[Trial | None] = SimpleQueue()
        self._answers = 0
        log = list(trials)

        def work() -> None:
            try:
                study, known = _open_study(open_storage(), name, objectives, log)
                for trial in log[known:]:
                    study.add_trial(frozen_trial(genome, trial))
                    self._answers += 1
                while (trial := self._left.get()) is not None:
                    study.add_trial(frozen_trial(genome, trial))
                    self._answers += 1
            except Exception as error:  # whatever a storage raises, the search goes on
                self._failure = _reason(error)

        # A daemon: one that waits for a storage for ever must not keep the program from ending.
        self._thread = Thread(target=work, name="mirror", daemon=True)
        self._thread.start()

    def append(self, trials: list[Trial]) -> None:
        for trial in trials:
            self._left.put(trial)
        self._tell()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        """Wait until everything is written, as long as the storage answers and nobody asks to stop."""
        self._left.put(None)
        answers, since = self._answers, time.monotonic()
        while self._thread.is_alive():
            self._thread.join(_LOOK_SECONDS)
            if self._answers != answers:
                answers = self._answers
                since = since if self._ending(error) else time.monotonic()
            if time.monotonic() - since > (_LAST_SECONDS if self._ending(error) else _PATIENCE_SECONDS):
                self._failure = self._failure or "its storage does not answer"
                break
        if not self._ending(error):
            self._tell()

    def _ending(self, error: type[BaseException] | None) -> bool:
        return error is not None or self._should_stop()

    def _tell(self) -> None:
        if self._failure and not self._told:
            self._told = True
            self._say(f"search: the study for optuna-dashboard stops here ({self._failure}); trials.jsonl continues")


def journal(path: Path) -> BaseStorage:
    """The journal file at ``path``, emptied if it is torn or no journal: the mirror fills it again."""
    # A killed writer leaves its lock behind, which would block for 30 seconds; the run directory has one writer.
    Path(f"{path}.lock").unlink(missing_ok=True)
    with suppress(Exception):  # whatever a damaged line raises
        if not path.exists() or _is_whole(path):
            return JournalStorage(JournalFileBackend(str(path)))
    path.unlink(missing_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def _is_whole(path: Path) -> bool:
    """Whether every line is complete JSON; Optuna ignores a torn last line, and writes the next one behind it."""
    with open(path, "rb") as file:
        return all(line.endswith(b"\n") and json.loads(line) for line in file)


def database(url: str) -> BaseStorage:
    """The database at ``url``, for any number of runs. Raises as SQLAlchemy."""
    return RDBStorage(url)


def check_database(
    url: str, should_stop: Callable[[], bool] = lambda: False, seconds: float = _PATIENCE_SECONDS
) -> None:
    """Open the database at ``url``.

    Raises
    ------
    MoesaicError : it cannot be opened, its driver is missing, or it does not answer within ``seconds``.
    Interrupted : after ``should_stop``.
    """
    answers: SimpleQueue[Exception | None] = SimpleQueue()

    def work() -> None:
        try:
            database(url)
        except Exception as error:  # drivers raise their own errors
            answers.put(error)
        else:
            answers.put(None)

    Thread(target=work, name="database", daemon=True).start()
    end = time.monotonic() + seconds
    while answers.empty() and time.monotonic() < end:
        if should_stop():
            raise Interrupted("stopped while the database was opened; the same command continues")
        time.sleep(_LOOK_SECONDS)
    why = f"no answer within {seconds:g} s" if answers.empty() else _reason(answers.get())
    if why:
        raise MoesaicError(
            "cannot open the database",
            where="mirror",
            found=f"{url} ({why})",
            allowed="a URL such as postgresql://USER@HOST/NAME or sqlite:///FILE, and the driver that it needs",
        )


def _reason(error: Exception | None) -> str:
    """The first line of what went wrong; empty for None."""
    if error is None:
        return ""
    return str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__


def _open_study(
    storage: BaseStorage, name: str, objectives: Sequence[str], trials: Sequence[Trial]
) -> tuple[optuna.Study, int]:
    """The study that mirrors ``trials``, and how many of them it has."""
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    for candidate in names:
        try:
            study = optuna.load_study(study_name=candidate, storage=storage)
        except KeyError:
            return _new_study(storage, candidate, objectives), 0
        if not study.user_attrs.get(_MARK):
            continue
        known = [trial.user_attrs.get("fingerprint") for trial in study.get_trials(deepcopy=False)]
        begins = known == [trial.architecture.fingerprint for trial in trials[: len(known)]]
        if begins and len(study.directions) == len(objectives):
            return study, len(known)
        optuna.delete_study(study_name=candidate, storage=storage)
        return _new_study(storage, candidate, objectives), 0
    raise AssertionError("names do not end")


def _new_study(storage: BaseStorage, name: str, objectives: Sequence[str]) -> optuna.Study:
    directions = [StudyDirection.MINIMIZE] * len(objectives)
    study = optuna.create_study(storage=storage, study_name=name, directions=directions)
    study.set_user_attr(_MARK, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(objectives))
    return study
