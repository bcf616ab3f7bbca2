"""The executor of a cluster under Ray Tune: an evaluation is a trial of Tune, and Tune's actors are the lanes.

Tune asks for proposals, schedules them, retries what died and tells the user's callbacks. It keeps the actors
(``reuse_actors``), so that a lane reads the supernet once. The log of the search is the record: Tune writes no
checkpoints, and its own snapshots are rare and never read.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from pyarrow.fs import FileSystem
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback, TBXLoggerCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher

from moesaic.nas import __version__
from moesaic.nas.config import DeviceConfig, ExecutorConfig
from moesaic.nas.executors.cluster import STARTS, Waiting, connected, in_short
from moesaic.nas.executors.executor import Outcome, Work
from moesaic.nas.executors.lane import Lane
from moesaic.search_spaces import Architecture, MoesaicError, StageFailed
from moesaic.supernet import Judge

_LOGGERS = {"json": JsonLoggerCallback, "csv": CSVLoggerCallback, "tensorboard": TBXLoggerCallback}
_SNAPSHOT_SECONDS = 600


class TuneLane(tune.Trainable):
    """A lane as an actor of Tune: the supernet stays, and each trial brings an architecture."""

    def setup(  # pyright: ignore[reportIncompatibleMethodOverride]  # `with_parameters` adds the rest
        self,
        config: dict[str, Any],
        make: type[Lane],
        version: str,
        facts: dict[str, Any],
        device: DeviceConfig,
        arrays: dict[str, np.ndarray],
    ) -> None:
        if version != __version__:
            raise MoesaicError(
                "a node of the cluster has another version of moesaic", found=__version__, allowed=version
            )
        self._lane = make(0, facts, device, arrays)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._architecture = Architecture.from_dict(json.loads(new_config["architecture"]), "a trial of Tune")
        return True

    def step(self) -> dict[str, Any]:
        """One evaluation is a whole trial. ``loss`` and ``seconds`` are for loggers."""
        try:
            outcome = self._lane.evaluate(self._architecture)
        except Exception:  # a bug in this program, which no other attempt mends
            return {"bug": traceback.format_exc(), "loss": math.nan, "done": True}
        loss = math.nan if outcome.evaluation is None else outcome.evaluation.loss
        return {"outcome": outcome, "loss": loss, "seconds": outcome.seconds, "done": True}


class TuneExecutor:
    """Lanes that Ray Tune places on the cluster at ``config.address``, or on a local Ray that ends with the executor.

    ``callbacks`` are objects of ``ray.tune.Callback`` beside the loggers that ``config.loggers`` names.

    Raises
    ------
    MoesaicError : as ``cluster.connected``; ``config.storage`` cannot be written.
    """

    def __init__(
        self,
        config: ExecutorConfig,
        judge: Judge,
        device: DeviceConfig,
        say: Callable[[str], None] = lambda text: None,
        callbacks: Sequence[tune.Callback] = (),
    ):
        self.lanes, self.config, self._say = config.lanes, config, say
        self._callbacks = [*(_LOGGERS[name]() for name in config.loggers), *callbacks]
        storage = storage_of(config)
        self._exits = ExitStack()
        self._exits.enter_context(connected(config, device))
        self._storage = storage or self._exits.enter_context(tempfile.TemporaryDirectory(prefix="moesaic-tune-"))
        facts, arrays = judge.plain()
        lane = tune.with_parameters(TuneLane, make=Lane, version=__version__, facts=facts, device=device, arrays=arrays)
        self._lane = tune.with_resources(lane, {"cpu": config.resources.cpu, "gpu": config.resources.gpu})

    def run(self, work: Work) -> None:
        trials = _Trials(work, self.config, self._say)
        with _settings(self.lanes):
            tuner = tune.Tuner(
                self._lane,
                tune_config=tune.TuneConfig(
                    search_alg=ConcurrencyLimiter(_Proposals(trials), max_concurrent=self.lanes),
                    scheduler=_InOrder(),
                    num_samples=-1,
                    reuse_actors=True,
                    trial_name_creator=str,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=tune.RunConfig(
                    name=f"moesaic-{secrets.token_hex(4)}",
                    storage_path=self._storage,
                    callbacks=[_Watch(trials), *self._callbacks],
                    stop=_Stop(trials),
                    failure_config=tune.FailureConfig(max_failures=self.config.retries),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    verbose=0,
                ),
            )
            tuner.fit()
        if trials.error is not None:
            raise trials.error

    def close(self) -> None:
        self._exits.close()


def storage_of(config: ExecutorConfig) -> str | None:
    """The folder or URL of ``config.storage``, which exists afterwards. Raises MoesaicError if it cannot be made."""
    if config.storage is None:
        return None
    storage = config.storage if "://" in config.storage else str(Path(config.storage).expanduser().absolute())
    try:
        filesystem, path = FileSystem.from_uri(storage)
        filesystem.create_dir(path)
    except (OSError, ValueError) as error:
        raise MoesaicError(
            "cannot be made",
            where="executor.storage",
            found=f"{config.storage} ({str(error).partition(chr(10))[0][:200]})",
            allowed="a folder that every machine shares, or the URL of an object store, such as s3://BUCKET/FOLDER",
        ) from None
    return storage


@contextmanager
def _settings(lanes: int) -> Iterator[None]:
    """Tune's settings that have no parameter, unless the user has set them: no loggers that nobody asked for, rare
    snapshots, all lanes started at once, Ctrl-C left to this program, and messages left to it too."""
    settings = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": str(_SNAPSHOT_SECONDS),
        "TUNE_MAX_PENDING_TRIALS_PG": str(lanes + 1),
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    added = {name: value for name, value in settings.items() if name not in os.environ}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ |= added
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name in added:
            del os.environ[name]


@dataclass
class _Job:
    """A trial of Tune as this program sees it. ``since`` is when its evaluation started, None before."""

    architecture: Architecture
    lane: int
    attempts: int = 0
    since: float | None = None
    trial: Trial | None = None
    late: bool = False


class _Trials:
    """The trials of Tune that run, between the work that proposes architectures and Tune's callbacks.

    Tune logs what is raised in a callback and goes on, so the first error is kept, ends the run and is raised after it.
    """

    def __init__(self, work: Work, config: ExecutorConfig, say: Callable[[str], None]):
        self.error: Exception | None = None
        self._work, self._config, self._say = work, config, say
        self._missing = Waiting(config, say)
        self._jobs: dict[str, _Job] = {}
        self._again: deque[Architecture] = deque()
        self._failed_starts = 0

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, for the pickles that Tune writes: the state of a search is its log."""
        return {}

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def propose(self, trial_id: str) -> dict[str, Any] | str | None:
        """The configuration of a new trial; None to wait, FINISHED at the end."""
        architecture = None
        with self._kept():
            if self.error is None:
                architecture = self._again.popleft() if self._again else self._work.ask()
        if architecture is None:
            return None if self._jobs and self.error is None else Searcher.FINISHED
        lane = min(set(range(self._config.lanes)) - {job.lane for job in self._jobs.values()})
        self._jobs[trial_id] = _Job(architecture, lane)
        return {"architecture": json.dumps(architecture.to_dict()), "fingerprint": architecture.fingerprint}

    def started(self, trial: Trial) -> None:
        self._failed_starts = 0
        job = self._jobs[trial.trial_id]
        job.trial, job.since = trial, time.monotonic()

    def ended(self, trial: Trial) -> None:
        job, result = self._jobs.pop(trial.trial_id), trial.last_result
        if "bug" in result:
            self.error = self.error or RuntimeError(result["bug"])
        else:
            outcome: Outcome = result["outcome"]
            self._tell(replace(outcome, architecture=job.architecture, lane=job.lane, attempts=job.attempts + 1))

    def retried(self, trial: Trial) -> None:
        """A lane died, and Tune starts the trial again."""
        job = self._jobs[trial.trial_id]
        if job.since is None:
            self._did_not_start(trial)
            return
        self._say(f"executor: lane {job.lane} died ({_reason(trial)}); its architecture is evaluated again")
        job.attempts, job.since = job.attempts + 1, None

    def failed(self, trial: Trial) -> None:
        """A lane died, and Tune does not start the trial again."""
        job = self._jobs.pop(trial.trial_id)
        if job.since is None:
            self._again.append(job.architecture)
            self._did_not_start(trial)
            return
        trial.run_metadata.pickled_error_filename = None  # Tune would load it, from a storage that others may write to
        attempts, seconds = job.attempts + 1, time.monotonic() - job.since
        reason = f"its lane died {attempts} times: {_reason(trial)}"
        if job.late:
            seconds = self._config.time_limit
            reason = f"took longer than executor.time_limit of {seconds:g} s"
        self._tell(Outcome(job.architecture, None, job.lane, seconds, attempts, reason, transient=True))

    def look(self) -> None:
        """End trials that take too long."""
        self._missing.look(any(job.since is not None for job in self._jobs.values()))
        for job in self._jobs.values():
            if job.since is None or job.late or time.monotonic() - job.since < self._config.time_limit:
                continue
            assert job.trial is not None
            job.late, job.trial.max_failures = True, 0
            if (actor := job.trial.temporary_state.ray_actor) is not None:
                ray.kill(actor)

    def _tell(self, outcome: Outcome) -> None:
        with self._kept():
            if self.error is None:
                self._work.tell(outcome)

    def _did_not_start(self, trial: Trial) -> None:
        self._failed_starts += 1
        if self._failed_starts == STARTS:
            problem = f"{STARTS} lanes in a row could not start"
            self.error = self.error or StageFailed(problem, where="executor", found=_reason(trial))


class _Proposals(Searcher):
    """Tune's view of the sampler. Outcomes reach it through the callback, which knows why a trial failed."""

    def __init__(self, trials: _Trials):
        super().__init__(metric="loss", mode="min")
        self._trials = trials

    def suggest(self, trial_id: str) -> Any:
        return self._trials.propose(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the log of the search is its state."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search continues from its log")


class _Watch(tune.Callback):
    """What Tune reports of its trials."""

    def __init__(self, trials: _Trials):
        self._trials = trials

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._trials.look()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._trials.started(trial)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._trials.ended(trial)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._trials.retried(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._trials.failed(trial)


class _InOrder(FIFOScheduler):
    """Trials start in the order of their proposals, on a free actor or a new one, which is what Tune does by itself.
    The choice of ``FIFOScheduler`` comes first and moves the trial of a starting actor to a free one; with evaluations
    shorter than a start, all actors but one are then dropped before they have started, again and again."""

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        return None


class _Stop(tune.Stopper):
    """Ends all trials after an error of this program."""

    def __init__(self, trials: _Trials):
        self._trials = trials

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._trials.error is not None


def _reason(trial: Trial) -> str:
    """Why the trial's last lane died. Tune also keeps the exception itself, as a pickle, which is not opened."""
    path = trial.error_file
    return in_short(Path(path).read_text()) if path else "unknown"
