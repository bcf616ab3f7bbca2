"""The trial log: one JSON line per proposal, append-only, the source of truth of a search."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moesaic.search_spaces import Architecture, MoesaicError
from moesaic.search_spaces.files import PathLike, unwritable
from moesaic.supernet.evaluate import LayerLoad

State = Literal["evaluated", "refused", "duplicate", "failed"]


@dataclass(frozen=True)
class Trial:
    """One proposal and its outcome.

    ``refused``: over budget by its predicted costs, never evaluated. ``duplicate``: its architecture was evaluated
    before, and the values are that trial's. ``failed``: it has no finite loss, and ``reason`` says why. ``excess`` is
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
        except (ValueError, KeyError, TypeError) as error:
            raise MoesaicError("is not a trial this program wrote", where=where, found=str(error)[:120]) from None
        if trial.architecture.fingerprint != fingerprint:
            raise MoesaicError("fingerprint and architecture disagree", where=where, found=fingerprint)
        return trial


def read_trials(path: PathLike) -> list[Trial]:
    """All complete trials of a log. An incomplete last line, and refusals whose trial never finished, do not count."""
    return _read(Path(path))[0]


class TrialLog:
    """Appends trials; opening removes what an interrupted process left incomplete."""

    def __init__(self, path: PathLike):
        self.path = path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.trials, good = _read(path)
            self._file = path.open("ab")  # until close
            self._file.truncate(good)
        except OSError as error:
            raise unwritable(path, error) from None

    def append(self, trials: list[Trial]) -> None:
        """Write an evaluated trial and the refusals before it at once, and flush them to disk."""
        start = self._file.tell()
        try:
            self._file.write("".join(trial.to_json() + "\n" for trial in trials).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # the next opening removes the incomplete end
                os.ftruncate(self._file.fileno(), start)
            raise unwritable(self.path, error) from None
        self.trials += trials

    def close(self) -> None:
        with suppress(OSError):  # a full disk was reported by append
            self._file.close()


def _read(path: Path) -> tuple[list[Trial], int]:
    """The complete trials and their size in bytes."""
    if not path.exists():
        return [], 0
    trials: list[Trial] = []
    waiting: list[Trial] = []
    good = at = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        at += len(line)
        if not line.endswith(b"\n"):
            break
        trial = Trial.from_json(line, f"{path}:{number}")
        waiting.append(trial)
        if trial.ended:
            trials += waiting
            waiting, good = [], at
    return trials, good
