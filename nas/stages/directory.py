"""The run directory: which stage is complete, which continues, and which must run again and why."""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moesaic.nas import __version__
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.files import read_json, read_value, unwritable, write_json, write_value

Inputs = Mapping[str, Any]
"""Everything that decides a stage's result, flat: dotted names and plain values."""


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys; lists stay values."""
    if isinstance(data, Mapping) and data:
        return {k: v for key, value in data.items() for k, v in flatten(value, f"{prefix}.{key}".lstrip(".")).items()}
    return {prefix: data}


def fingerprint(inputs: Inputs) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Change:
    """An input whose value changed; None where it was or is absent."""

    name: str
    before: Any
    now: Any

    def under(self, names: Sequence[str]) -> bool:
        """Whether the input is one of ``names``, or a part of one of them."""
        return any(self.name == name or self.name.startswith(f"{name}.") for name in names)

    def __str__(self) -> str:
        before, now = ("nothing" if value is None else value for value in (self.before, self.now))
        return f"{self.name} changed from {before} to {now}"


@dataclass(frozen=True)
class Artifact:
    """``artifact.json`` of a complete stage. ``digest`` identifies a result that its inputs alone do not determine."""

    inputs: dict[str, Any]
    fingerprint: str
    digest: str | None
    seconds: float
    resumed: bool
    version: str
    finished: str


@dataclass(frozen=True)
class StageDirectory:
    """One stage's folder. ``inputs.json`` is written when the stage starts, ``artifact.json`` when it ends."""

    path: Path
    inputs: Inputs

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.inputs)

    @property
    def complete(self) -> bool:
        artifact = self.path / "artifact.json"
        return artifact.exists() and read_json(artifact)["inputs"] == self.inputs

    def changes(self) -> list[Change]:
        """Differences between the inputs of earlier work and the current ones; empty without earlier work."""
        known = self.path / "inputs.json"
        if not known.exists():
            return []
        old = read_json(known)
        names = sorted({*old, *self.inputs}, key=str)
        changes = (Change(name, old.get(name), self.inputs.get(name)) for name in names)
        return [change for change in changes if change.before != change.now]

    def finish(self, seconds: float, resumed: bool, digest: str | None = None) -> None:
        """Mark the stage complete."""
        finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        inputs = dict(self.inputs)
        artifact = Artifact(inputs, self.fingerprint, digest, round(seconds, 2), resumed, __version__, finished)
        write_value(self.path / "artifact.json", artifact)

    def artifact(self) -> Artifact:
        return read_value(self.path / "artifact.json", Artifact)

    def result_id(self) -> str:
        """Identifies a finished stage's result: its inputs, and its digest where the stage measured something."""
        return fingerprint({"inputs": self.inputs, "digest": self.artifact().digest if self.complete else None})


@dataclass(frozen=True)
class Preparation:
    """Whether earlier work in a stage's folder ``continues``, what changed, and where outdated work was moved."""

    continues: bool
    changes: list[Change]
    aside: Path | None = None


class RunDirectory:
    """A folder with a subfolder per stage, used by one process at a time."""

    def __init__(self, path: Path):
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder. Raises MoesaicError when another process has locked it or it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0)
            with lock:
                yield
        except Timeout:
            raise MoesaicError(
                "another moesaic is running in this directory",
                where=str(self.path),
                allowed="wait for it, or --out another directory",
            ) from None
        except OSError as error:
            raise unwritable(self.path, error) from None

    def stage(self, name: str, inputs: Any) -> StageDirectory:
        plain = json.loads(json.dumps({**flatten(inputs), "version": __version__}))
        return StageDirectory(self.path / name, plain)

    def prepare(self, stage: StageDirectory, extendable: Sequence[str] = ()) -> Preparation:
        """Make the stage's folder ready for work.

        Work with other inputs is moved to ``previous/``, not deleted, unless only ``extendable`` ones changed.
        """
        changes = stage.changes()
        existing = (stage.path / "inputs.json").exists()
        moves = not all(change.under(extendable) for change in changes)
        aside = self.set_aside(stage.path, stage.path.name) if moves else None
        try:
            stage.path.mkdir(parents=True, exist_ok=True)
            (stage.path / "artifact.json").unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(stage.path, error) from None
        write_json(stage.path / "inputs.json", stage.inputs)
        return Preparation(existing and not moves, changes, aside)

    def set_aside(self, path: Path, name: str) -> Path:
        """Move outdated work to a new folder ``previous/NAME-N``. Raises MoesaicError where that cannot be written."""
        numbered = (self.path / "previous" / f"{name}-{attempt}" for attempt in count(1))
        aside = next(path for path in numbered if not path.exists())
        try:
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
        except OSError as error:
            raise unwritable(path, error) from None
        return aside


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """A one-element list that holds the seconds the block took, once it ends."""
    seconds = [0.0]
    start = time.perf_counter()
    try:
        yield seconds
    finally:
        seconds[0] = time.perf_counter() - start
