"""The executor of many short evaluations on a Ray cluster: each lane is a long-lived actor.

Ray places the lanes, carries proposals and results, and reports dead lanes; a dead lane is restarted on any node with
room. A result and the next proposal take about a millisecond, a tenth of what a trial of Tune takes
(docs/reliability.md), and the next proposal is ready before a lane asks for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from moesaic.nas import __version__
from moesaic.nas.config import DeviceConfig, ExecutorConfig
from moesaic.nas.executors.cluster import STARTS, Waiting, connected, in_short
from moesaic.nas.executors.executor import Outcome, Work
from moesaic.nas.executors.lane import Lane
from moesaic.search_spaces import Architecture, MoesaicError, StageFailed
from moesaic.supernet import Judge

_POLL = 1.0
"""Seconds between checks of the time limits while nothing ends."""


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
        self._ray = ExitStack()
        self._ray.enter_context(connected(config, device))
        facts, arrays = judge.plain()
        self._arguments = facts, device, ray.put(arrays)
        self._actor = ray.remote(Lane).options(num_cpus=config.resources.cpu, num_gpus=config.resources.gpu)
        self._waiting: deque[_Job] = deque()
        self._failed_starts = 0
        self._missing = Waiting(config, say)
        self._slots = [self._start(number) for number in range(config.lanes)]

    def run(self, work: Work) -> None:
        while True:
            while self._free and (architecture := work.ask()) is not None:
                self._waiting.append(_Job(architecture))
                self._dispatch()
            if not self._running:
                return
            work.tell(self._next())

    @property
    def _running(self) -> int:
        return len(self._waiting) + sum(slot.job is not None for slot in self._slots)

    @property
    def _free(self) -> int:
        """How many more architectures can be taken now."""
        return self.lanes + self._ahead - self._running

    def _next(self) -> Outcome:
        """Wait for the first evaluation to end."""
        while True:
            self._dispatch()
            done, _ = ray.wait([slot.reference for slot in self._slots if not slot.idle], timeout=_POLL)
            for slot in self._slots:
                if slot.reference in done and (outcome := self._ended(slot)) is not None:
                    self._dispatch()
                    return outcome
                if slot.job is not None and time.monotonic() - slot.since > self.config.time_limit:
                    return self._timed_out(slot)
            self._missing.look(any(slot.idle or slot.job is not None for slot in self._slots))

    def close(self) -> None:
        for slot in self._slots:
            ray.kill(slot.actor)
        self._ray.close()

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
        job, why = slot.job, in_short(why)
        if job is None:
            self._failed_starts += 1
            if self._failed_starts == STARTS:
                raise StageFailed(f"{STARTS} lanes in a row could not start", where="executor", found=why)
            return None
        attempts = job.attempts + 1
        if attempts <= self.config.retries:
            self._say(f"executor: lane {slot.number} died ({why}); its architecture is evaluated again")
            self._waiting.appendleft(_Job(job.architecture, attempts, slot.number))
            return None
        seconds = time.monotonic() - slot.since
        reason = f"its lane died {attempts} times: {why}"
        return Outcome(job.architecture, None, slot.number, seconds, attempts, reason, transient=True)

    def _timed_out(self, slot: _Slot) -> Outcome:
        assert slot.job is not None
        ray.kill(slot.actor)
        self._restart(slot)
        limit = self.config.time_limit
        reason = f"took longer than executor.time_limit of {limit:g} s"
        return Outcome(slot.job.architecture, None, slot.number, limit, slot.job.attempts + 1, reason, transient=True)
