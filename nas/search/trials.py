"""The trial log: one JSON line per proposal, append-only, the source of truth of a search."""

from __future__ import annotations

import json
import math
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import Architecture, Damaged, MoesaicError
from moesaic.search_spaces.files import LineFile, PathLike, unwritable
from moesaic.supernet.evaluate import LayerLoad

State = Literal["evaluated", "refused", "duplicate", "failed"]


@dataclass(frozen=True)
class Trial:
    """One proposal and its outcome.

    ``refused``: over budget by its predicted costs, never evaluated. ``duplicate``: its architecture was evaluated
    before, and the values are that trial's. ``failed``: it has no finite loss, and ``reason`` says why; a ``transient``
    failure is evaluated again, as another trial, when the search is started again. ``excess`` is
    relative to each budget line, negative if inside, and under the measured load once there is one. ``seconds``,
    ``lane`` and ``attempts`` describe the evaluation; ``seed`` is the search's. Where there are several budgets,
    ``budget`` names the one that the trial was proposed for and that ``excess`` refers to. ``engine`` is what the
    sampler needs to know about the trial after a restart.
    """

    number: int
    state: State
    architecture: Architecture
    costs: dict[str, float]
    excess: dict[str, float]
    loss: float | None = None
    standard_error: float | None = None
    loads: tuple[LayerLoad | None, ...] = ()
    values: tuple[float, ...] = ()
    seconds: float = 0.0
    seed: int = 0
    budget: str = ""
    lane: int | None = None
    attempts: int = 1
    reason: str | None = None
    transient: bool = False
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether it was evaluated, successfully or not."""
        return self.state in ("evaluated", "failed")

    @property
    def feasible(self) -> bool:
        """Whether it was evaluated and is its ``excess`` is inside every budget line."""
        return self.state == "evaluated" and all(value <= 0 for value in self.excess.values())

    def to_json(self) -> str:
        data = {
            **{k: v for k, v in vars(self).items() if k not in ("architecture", "loads")},
            "fingerprint": self.architecture.fingerprint,
            "architecture": self.architecture.to_dict(),
            "loads": [load and [round(p, 6) for p in load.pairs_per_token] for load in self.loads],
        }
        return json.dumps(data, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(line: str | bytes, where: str) -> Trial:
        try:
            data = json.loads(line)
            fingerprint = data.pop("fingerprint")
            data["architecture"] = Architecture.from_dict(data["architecture"], where)
            data["loads"] = tuple(load and LayerLoad(tuple(load)) for load in data["loads"])
            data["values"] = tuple(data["values"])
            trial = Trial(**data)
            trial._check()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MoesaicError("is not a trial this program wrote", where=where, found=str(error)[:120]) from None
        if trial.architecture.fingerprint != fingerprint:
            raise MoesaicError("fingerprint and architecture disagree", where=where, found=fingerprint)
        return trial

    def _check(self) -> None:
        """Raises ValueError for values that no proposal has."""
        if self.state not in get_args(State):
            raise ValueError(f"state {self.state}")
        if unknown := [name for name in self.excess if name not in DIMENSIONS]:
            raise ValueError(f"excess over {unknown[0]}")
        numbers = {f"costs.{name}": value for name, value in self.costs.items()}
        numbers |= {f"excess.{name}": value for name, value in self.excess.items()}
        numbers |= {f"values.{index}": value for index, value in enumerate(self.values)}
        facts: dict[str, Any] = numbers | {"seconds": self.seconds}
        facts |= {"loss": self.loss} if self.state == "evaluated" else {}
        for name, value in facts.items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"{name} is {value}")


def read_trials(path: PathLike) -> list[Trial]:
    """All complete trials of a log. An incomplete last line, and refusals whose trial never finished, do not count.

    Raises
    ------
    Damaged : a line is not a trial, is not in its place, or evaluates an architecture a second time.
    """
    return _read(Path(path))[0]


def first_trials(trials: Sequence[Trial], evaluations: int) -> list[Trial]:
    """The log of the first ``evaluations`` architectures that were evaluated for each budget."""
    ended: defaultdict[str, set[str]] = defaultdict(set)
    kept = []
    for trial in trials:
        known, fingerprint = ended[trial.budget], trial.architecture.fingerprint
        if len(known) < evaluations or (trial.ended and fingerprint in known):
            kept.append(trial)
            known |= {fingerprint} if trial.ended else set()
    return kept


class TrialLog:
    """Appends trials; opening removes what an interrupted process left incomplete, and raises as ``read_trials``."""

    def __init__(self, path: PathLike):
        self.path = path = Path(path)
        self.trials, size = _read(path)
        try:
            self._file = LineFile(path, size)
        except OSError as error:
            raise unwritable(path, error) from None

    def append(self, trials: list[Trial]) -> None:
        """Write an evaluated trial and the refusals before it, and return when they are on the disk.

        Raises
        ------
        MoesaicError : the disk is full; the log has none of them.
        """
        self._file.append("".join(trial.to_json() + "\n" for trial in trials), sync=True)
        self.trials += trials

    def close(self) -> None:
        self._file.close()


def _read(path: Path) -> tuple[list[Trial], int]:
    """The complete trials and their size in bytes."""
    if not path.exists():
        return [], 0
    trials: list[Trial] = []
    waiting: list[Trial] = []
    evaluated: dict[str, int] = {}
    good = at = 0
    for index, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
        at += len(line) + 1
        trial = _trial(path, index, line)
        if trial.state == "evaluated":
            first = evaluated.setdefault(trial.architecture.fingerprint, index)
            if first != index:
                raise _damaged(path, index, f"evaluates the architecture of line {first + 1} again")
        waiting.append(trial)
        if trial.ended:
            trials += waiting
            waiting, good = [], at
    return trials, good


def _trial(path: Path, index: int, line: bytes) -> Trial:
    try:
        trial = Trial.from_json(line, str(path))
    except MoesaicError as error:
        raise _damaged(path, index, error.problem, error.found) from None
    if trial.number != index:
        raise _damaged(path, index, "is not in its place", f"number {trial.number}", f"number {index}")
    return trial


def _damaged(path: Path, index: int, problem: str, found: object = None, allowed: object = None) -> Damaged:
    """The remedy keeps the lines before; those from this one on are evaluated again."""
    command = f"sed -i.damaged '{index + 1},$d' {shlex.quote(str(path))}"
    return Damaged(problem, path, index + 1, found=found, allowed=allowed, nearest=command)
