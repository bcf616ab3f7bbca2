"""The run directory: which stage is complete, which continues, and which must run again and why."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moesaic.nas import __version__
from moesaic.search_spaces import Damaged, MoesaicError
from moesaic.search_spaces.files import read_json, read_value, sweep, sync_folder, unwritable, write_json, write_value

Inputs = Mapping[str, Any]
"""Everything that decides a stage's files, flat: dotted names and plain values."""
ARTIFACT, INPUTS, OTHERS, LOCK = "artifact.json", "inputs.json", "others.json", ".lock"


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys; lists stay values."""
    if isinstance(data, Mapping) and data:
        return {k: v for key, value in data.items() for k, v in flatten(value, f"{prefix}.{key}".lstrip(".")).items()}
    return {prefix: data}


def under(name: str, names: Sequence[str]) -> bool:
    """Whether an input is one of ``names``, or a part of one of them."""
    return any(name == other or name.startswith(f"{other}.") for other in names)


def fingerprint(inputs: Inputs) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Change:
    """An input whose value changed; None where it was or is absent."""

    name: str
    before: Any
    now: Any

    def under(self, names: Sequence[str]) -> bool:
        """Whether the input is ``under`` the names; ``budgets.*`` is a part of budgets that is new or gone."""
        new_or_gone = self.before is None or self.now is None
        parts = tuple(name.removesuffix(".*") for name in names if new_or_gone and name.endswith(".*"))
        return under(self.name, (*names, *parts))

    def __str__(self) -> str:
        before, now = ("nothing" if value is None else value for value in (self.before, self.now))
        return f"{self.name} changed from {before} to {now}"


@dataclass(frozen=True)
class Artifact:
    """``artifact.json`` of a complete stage. ``digest`` identifies a result that its inputs alone do not determine;
    ``files`` are those that the stage wrote (None: those of an earlier version, unknown)."""

    inputs: dict[str, Any]
    fingerprint: str
    digest: str | None
    seconds: float
    resumed: bool
    version: str
    finished: str
    files: tuple[str, ...] | None = None


def has_begun(path: Path) -> bool:
    """Whether a stage has worked in the folder."""
    return (path / INPUTS).exists()


def check_place(path: Path, mark: str = INPUTS) -> None:
    """Raises MoesaicError where something without this program's ``mark`` is in the place of a folder of its own."""
    if (path / mark).exists() or not os.path.lexists(path):
        return
    if not path.is_dir() or any(path.iterdir()):
        raise MoesaicError(
            "was not made by this program, and a folder of its own must go there",
            where=str(path),
            allowed="move it away, or another --out",
        )


@dataclass(frozen=True)
class StageDirectory:
    """One stage's folder. ``inputs.json`` is written when the stage starts, ``artifact.json`` when it ends.

    Later stages do not depend on ``private`` inputs. ``others.json`` lists files that the stage did not write.
    """

    path: Path
    inputs: Inputs
    private: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.inputs)

    @property
    def complete(self) -> bool:
        return (self.path / ARTIFACT).exists() and self._inputs_in(ARTIFACT, "inputs") == self.inputs

    @property
    def settled(self) -> bool:
        """Whether the stage is complete but for private inputs, so that later stages may use its result."""
        if not (self.path / ARTIFACT).exists():
            return False
        return self._deciding(self._inputs_in(ARTIFACT, "inputs")) == self._deciding(self.inputs)

    def _deciding(self, inputs: Inputs) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if not under(name, self.private)}

    def changes(self) -> list[Change]:
        """Differences between the inputs of earlier work and the current ones; empty without earlier work."""
        if not self.begun:
            return []
        old = self._inputs_in(INPUTS)
        names = sorted({*old, *self.inputs}, key=str)
        changes = (Change(name, old.get(name), self.inputs.get(name)) for name in names)
        return [change for change in changes if change.before != change.now]

    def _inputs_in(self, file: str, *keys: str) -> dict[str, Any]:
        data = read_json(self.path / file)
        for key in keys:
            data = data.get(key) if isinstance(data, dict) else None
        if not isinstance(data, dict):
            raise Damaged("is damaged: it has no inputs", self.path / file)
        return data

    @property
    def begun(self) -> bool:
        """Whether the folder is the stage's: it has worked there."""
        return has_begun(self.path)

    def finish(self, seconds: float, resumed: bool, digest: str | None = None) -> None:
        """Mark the stage complete."""
        finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        files = tuple(sorted(filter(_is_text, self._files() - set(self.others()))))
        artifact = Artifact(
            dict(self.inputs), self.fingerprint, digest, round(seconds, 2), resumed, __version__, finished, files
        )
        write_value(self.path / ARTIFACT, artifact)

    def artifact(self) -> Artifact:
        return read_value(self.path / ARTIFACT, Artifact)

    def others(self) -> list[str]:
        """Files in the folder that the stage did not write, as far as is known: those that came since it was complete,
        and those that were there when it began."""
        if (self.path / ARTIFACT).exists():
            written = self.artifact().files
            return [] if written is None else sorted(self._files() - set(written))
        known = read_json(self.path / OTHERS) if (self.path / OTHERS).exists() else []
        return sorted(self._files() & set(known))

    def _files(self) -> set[str]:
        """Names of the files below the folder, without those that describe the stage."""
        found: set[str] = set()
        for top, folders, names in os.walk(self.path):
            links = [name for name in folders if Path(top, name).is_symlink()]
            found |= {os.path.relpath(os.path.join(top, name), self.path) for name in (*names, *links)}
        return found - {ARTIFACT, INPUTS, OTHERS}

    def result_id(self) -> str:
        """Identifies a finished stage's result: its inputs, and its digest where the stage measured something."""
        digest = self.artifact().digest if self.settled else None
        return fingerprint({"inputs": self._deciding(self.inputs), "digest": digest})


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
        """Lock the folder, and remove what killed processes left half-written in it.

        Raises
        ------
        MoesaicError : another process has locked it, or it cannot be written.
        """
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise MoesaicError(
                "another moesaic is running in this directory",
                where=str(self.path),
                allowed="wait for it, or --out another directory",
            ) from None
        except OSError as error:
            raise unwritable(self.path, error) from None
        try:
            sweep(self.path, below=False)
            yield
        finally:
            lock.release()

    def stage(self, name: str, inputs: Any, private: tuple[str, ...] = ()) -> StageDirectory:
        plain = json.loads(json.dumps({**flatten(inputs), "version": __version__}))
        return StageDirectory(self.path / name, plain, private)

    def prepare(self, stage: StageDirectory, extendable: Sequence[str] = ()) -> Preparation:
        """Make the stage's folder ready for work.

        Work with other inputs is moved to ``previous/``, not deleted, unless only ``extendable`` ones changed. Files
        that the stage did not write stay where they are.

        Raises
        ------
        MoesaicError : something else has the folder's place, or it cannot be written.
        """
        check_place(stage.path)
        sweep(stage.path)
        changes, existing, others = stage.changes(), stage.begun, stage.others()
        moves = not all(change.under(extendable) for change in changes)
        aside = self.set_aside(stage.path, stage.path.name) if moves else None
        try:
            if aside is not None:
                for name in others:
                    (stage.path / name).parent.mkdir(parents=True, exist_ok=True)
                    (aside / name).rename(stage.path / name)
            stage.path.mkdir(parents=True, exist_ok=True)
            if others:
                write_json(stage.path / OTHERS, others)
            (stage.path / ARTIFACT).unlink(missing_ok=True)
            sync_folder(self.path)
        except OSError as error:
            raise unwritable(stage.path, error) from None
        write_json(stage.path / INPUTS, stage.inputs)
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


def _is_text(name: str) -> bool:
    """Whether a file name can be written as JSON; all that this program chooses can."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """A one-element list that holds the seconds the block took, once it ends."""
    seconds = [0.0]
    start = time.perf_counter()
    try:
        yield seconds
    finally:
        seconds[0] = time.perf_counter() - start
