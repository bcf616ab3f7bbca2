"""The executor of a Ray cluster: each lane is a long-lived actor that evaluates slices of one supernet.

Ray places the lanes, carries proposals and results, and reports dead lanes; a dead lane is restarted on any node with
room. Lanes are actors, not Tune trials: Tune's controller needs 0.1 s or more per result, an actor call about a
millisecond (docs/reliability.md has both).
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from moesaic.nas import __version__
from moesaic.nas.config import DeviceConfig, ExecutorConfig
from moesaic.nas.device import choose_device, usable_processors
from moesaic.nas.executors.executor import Outcome
from moesaic.nas.executors.local import attempt
from moesaic.search_spaces import Architecture, MoesaicError, StageFailed
from moesaic.supernet import Judge

_POLL = 1.0
"""Seconds between checks of the time limits while nothing ends."""
_PATIENCE = 20.0
"""After this many seconds without a lane, the user is told what the search is waiting for."""
_STARTS = 3
"""The search stops after this many failed starts of lanes in a row."""


class Lane:
    """The actor. Its weights are views of the object store's memory, which all lanes of a node share."""

    def __init__(self, number: int, facts: dict[str, Any], device: DeviceConfig, arrays: dict[str, np.ndarray]):
        self.number, where = number, choose_device(device).torch_device
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
            self.judge = Judge.of(facts, arrays, where)

    def version(self) -> str:
        return __version__

    def evaluate(self, architecture: Architecture) -> Outcome:
        return attempt(self.judge, architecture, self.number)


@dataclass(frozen=True)
class _Job:
    architecture: Architecture
    attempts: int = 0
    last_lane: int | None = None


@dataclass
class _Slot:
    """A lane as the driver sees it: its actor, the pending result, and since when it is pending."""

    number: int
    actor: Any
    reference: Any
    job: _Job | None = None
    idle: bool = False
    since: float = 0.0


class RayExecutor:
    """Lanes on the cluster at ``config.address``, or on a local Ray that ends with the executor.

    Raises
    ------
    MoesaicError : no cluster answers, or this machine has fewer processors than local lanes need.
    """

    def __init__(
        self,
        config: ExecutorConfig,
        judge: Judge,
        device: DeviceConfig,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.lanes, self.config, self._say = config.lanes, config, say
        # One extra proposal keeps lanes from waiting for the sampler. A single lane searches as a local run.
        self._ahead = int(config.lanes > 1)
        self._owner = connect(config)
        facts, arrays = judge.plain()
        self._arguments = facts, device, ray.put(arrays)
        threads = device.threads or max(1, int(config.resources.cpu))
        self._actor = ray.remote(Lane).options(
            num_cpus=config.resources.cpu,
            num_gpus=config.resources.gpu,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        self._waiting: deque[_Job] = deque()
        self._failed_starts = 0
        self._started = time.monotonic()
        self._told = False
        self._slots = [self._start(number) for number in range(config.lanes)]

    @property
    def free(self) -> int:
        return self.lanes + self._ahead - len(self._waiting) - sum(slot.job is not None for slot in self._slots)

    def submit(self, architecture: Architecture) -> None:
        assert self.free, "all lanes are taken"
        self._waiting.append(_Job(architecture))
        self._dispatch()

    def next(self) -> Outcome:
        while True:
            self._dispatch()
            done, _ = ray.wait([slot.reference for slot in self._slots if not slot.idle], timeout=_POLL)
            for slot in self._slots:
                if slot.reference in done and (outcome := self._ended(slot)) is not None:
                    self._dispatch()
                    return outcome
                if slot.job is not None and time.monotonic() - slot.since > self.config.time_limit:
                    return self._timed_out(slot)
            self._tell_what_is_missing()

    def close(self) -> None:
        for slot in self._slots:
            ray.kill(slot.actor)
        if self._owner:
            ray.shutdown()

    def _start(self, number: int) -> _Slot:
        actor: Any = self._actor.remote(number, *self._arguments)
        return _Slot(number, actor, actor.version.remote(), since=time.monotonic())

    def _restart(self, slot: _Slot) -> None:
        self._slots[slot.number] = self._start(slot.number)

    def _dispatch(self) -> None:
        """Give waiting jobs to idle lanes; a job whose lane died goes to another lane, if there is one."""
        idle = [slot for slot in self._slots if slot.idle]
        while idle and self._waiting:
            job = self._waiting.popleft()
            slot = next((one for one in idle if one.number != job.last_lane), idle[0])
            idle.remove(slot)
            slot.job, slot.idle, slot.since = job, False, time.monotonic()
            slot.reference = slot.actor.evaluate.remote(job.architecture)

    def _ended(self, slot: _Slot) -> Outcome | None:
        """The lane's message: that it is ready, or an outcome; None where no evaluation ended finally."""
        job = slot.job
        try:
            answer: Any = ray.get(slot.reference)
        except RayTaskError:
            raise  # a bug in this program, not a fault of the cluster
        except RayError as error:
            self._restart(slot)
            return self._died(slot, str(error))
        slot.job, slot.idle = None, True
        if job is not None:
            return replace(answer, attempts=job.attempts + 1)
        self._failed_starts = 0
        if answer != __version__:
            raise MoesaicError(
                "a node of the cluster has another version of moesaic", found=answer, allowed=__version__
            )
        return None

    def _died(self, slot: _Slot, why: str) -> Outcome | None:
        job, why = slot.job, _in_short(why)
        if job is None:
            self._failed_starts += 1
            if self._failed_starts == _STARTS:
                raise StageFailed(f"{_STARTS} lanes in a row could not start", where="executor", found=why)
            return None
        attempts = job.attempts + 1
        if attempts <= self.config.retries:
            self._say(f"executor: lane {slot.number} died ({why}); its architecture is evaluated again")
            self._waiting.appendleft(_Job(job.architecture, attempts, slot.number))
            return None
        seconds = time.monotonic() - slot.since
        reason = f"its lane died {attempts} times: {why}"
        return Outcome(job.architecture, None, slot.number, seconds, attempts, reason)

    def _timed_out(self, slot: _Slot) -> Outcome:
        assert slot.job is not None
        ray.kill(slot.actor)
        self._restart(slot)
        limit = self.config.time_limit
        reason = f"took longer than executor.time_limit of {limit:g} s"
        return Outcome(slot.job.architecture, None, slot.number, limit, slot.job.attempts + 1, reason)

    def _tell_what_is_missing(self) -> None:
        """Tell the user once, when no lane could start for long and the cluster has no room for one."""
        alive = any(slot.idle or slot.job is not None for slot in self._slots)
        if self._told or alive or time.monotonic() - self._started < _PATIENCE:
            return
        wanted, free = self.config.resources, ray.available_resources()
        processors, gpus = free.get("CPU", 0), free.get("GPU", 0)
        if processors < wanted.cpu or gpus < wanted.gpu:
            self._told = True
            self._say(
                f"executor: waiting for a node with {wanted.cpu:g} CPUs and {wanted.gpu:g} GPUs for a lane; "
                f"free in the cluster: {processors:g} CPUs, {gpus:g} GPUs"
            )


def connect(config: ExecutorConfig) -> bool:
    """Connect to the cluster of ``config``; True where this started Ray or the connection, so that ``ray.shutdown``
    must end it."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent from a user's machine
    if config.address is None:
        processors, needed = usable_processors(), config.lanes * config.resources.cpu
        if needed > processors:
            raise MoesaicError(
                f"{config.lanes} lanes need {needed:g} processors and this machine has {processors}",
                where="executor.lanes",
                allowed="fewer lanes, a smaller executor.resources.cpu, or the address of a cluster",
                nearest=max(1, int(processors / config.resources.cpu)),
            )
    own: dict[str, Any] = {"include_dashboard": False} if config.address is None else {}
    with _signals_kept():
        try:
            if config.address not in (None, "auto"):
                _look_for(config.address)
            ray.init(address=config.address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except (OSError, ValueError) as error:  # a ConnectionError is an OSError
            raise MoesaicError(
                "no Ray cluster answers",
                where="executor.address",
                found=f"{config.address} ({_in_short(str(error))})",
                allowed="auto, or HOST:PORT as `ray start --head` prints it; without one, Ray starts on this machine",
            ) from None
    return True


def _look_for(address: str) -> None:
    """Raises OSError or ValueError where nothing answers; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=5).close()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore the SIGTERM handler, which ``ray.init`` replaces; a search must finish running evaluations first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _in_short(message: str) -> str:
    """The essence of Ray's long messages: the exception that was raised, or why the lane died."""
    raised = re.findall(r"^\S*(?:Error|Exception): .*$", message, re.MULTILINE)
    cause = re.findall(r"because (.+?)(?:\.\s|\n|$)", message)
    return (raised[-1] if raised else cause[-1] if cause else message.strip().partition("\n")[0])[:200]
