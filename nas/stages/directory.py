"""The run directory: which stage is complete, which continues, and which must be done anew and why."""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moesaic.nas import __version__
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.files import read_json, unwritable, write_json

Inputs = Mapping[str, Any]
"""Everything that decides a stage's result, flat: dotted names and plain values."""


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; lists stay values."""
    if isinstance(data, Mapping) and data:
        return {k: v for key, value in data.items() for k, v in flatten(value, f"{prefix}.{key}".lstrip(".")).items()}
    return {prefix: data}


def fingerprint(inputs: Inputs) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class StageDirectory:
    """One stage's folder. ``inputs.json`` is there from its start, ``artifact.json`` from its end."""

    path: Path
    inputs: Inputs

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.inputs)

    @property
    def complete(self) -> bool:
        artifact = self.path / "artifact.json"
        return artifact.exists() and read_json(artifact)["inputs"] == self.inputs

    def changes(self) -> list[str]:
        """What differs between the inputs of what is there and those of now; empty when nothing is there."""
        known = self.path / "inputs.json"
        if not known.exists():
            return []
        old = read_json(known)
        names = sorted({*old, *self.inputs}, key=str)
        return [
            f"{name} changed from {old.get(name, 'nothing')} to {self.inputs.get(name, 'nothing')}"
            for name in names
            if old.get(name) != self.inputs.get(name)
        ]

    def finish(self, seconds: float, resumed: bool, digest: str | None = None) -> None:
        """Mark the stage complete. ``digest`` identifies a result that its inputs alone do not (a measurement)."""
        write_json(
            self.path / "artifact.json",
            {
                "inputs": self.inputs,
                "fingerprint": self.fingerprint,
                "digest": digest,
                "seconds": round(seconds, 2),
                "resumed": resumed,
                "version": __version__,
                "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            },
        )

    def artifact(self) -> dict[str, Any]:
        return read_json(self.path / "artifact.json")


class RunDirectory:
    """A folder with a subfolder per stage, used by one process at a time."""

    def __init__(self, path: Path):
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder. Raises MoesaicError when another process holds it or it cannot be written."""
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

    def prepare(self, stage: StageDirectory, extendable: Sequence[str] = ()) -> tuple[bool, list[str]]:
        """Make the stage's folder ready for work. Returns whether earlier work in it continues, and what changed.

        Work with other inputs is moved to ``previous/``, not deleted, unless only ``extendable`` ones, or parts of
        them, changed.
        """
        changes = stage.changes()
        harmless = tuple(f"{name}{end}" for name in extendable for end in (" changed", "."))
        kept = [change for change in changes if not change.startswith(harmless)]
        existing = (stage.path / "inputs.json").exists()
        try:
            if kept:
                attempt = 1
                while (aside := self.path / "previous" / f"{stage.path.name}-{attempt}").exists():
                    attempt += 1
                aside.parent.mkdir(exist_ok=True)
                stage.path.rename(aside)
            stage.path.mkdir(parents=True, exist_ok=True)
            (stage.path / "artifact.json").unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(stage.path, error) from None
        write_json(stage.path / "inputs.json", stage.inputs)
        return existing and not kept, changes


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """A one-element list that holds the seconds the block took, once it is left."""
    seconds = [0.0]
    start = time.perf_counter()
    try:
        yield seconds
    finally:
        seconds[0] = time.perf_counter() - start
