"""The files of a run that belong to no stage: what each stage was run with, and the settings; a person's stay."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.nas.device import versions
from moesaic.nas.stages.directory import check_place, has_begun
from moesaic.nas.stages.run import BudgetRun, Run
from moesaic.nas.stages.stage import STAGES
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.files import read_json, write_json, write_text

CONFIGURATION, ENVIRONMENT, SUMMARY = "config.yaml", "env.json", "summary.json"
_RECORD = ".moesaic.json"


@dataclass(frozen=True)
class OwnFiles:
    """Files in a folder that people use too. ``.moesaic.json`` has the digests of what this program wrote there."""

    folder: Path

    def owns(self, name: str) -> bool:
        """Whether a file of that name may be written: there is none, or its content is this program's."""
        path = self.folder / name
        return not path.exists() or (path.is_file() and _digest(path.read_bytes()) in self._known().get(name, []))

    def check(self, *names: str) -> None:
        """Raises MoesaicError for the first file that this program did not write."""
        for name in names:
            if not self.owns(name):
                raise MoesaicError(
                    "was not written by this program, or was changed since, and stays as it is",
                    where=str(self.folder / name),
                    allowed="another --out, or move it away",
                )

    def write(self, name: str, text: str) -> None:
        """Write a file, unless it has that content already. Raises as ``check``."""
        self.check(name)
        path, data = self.folder / name, text.encode()
        if path.exists() and path.read_bytes() == data:
            return
        known = self._known()
        digests = [_digest(data), *known.get(name, [])]
        write_json(self.folder / _RECORD, known | {name: list(dict.fromkeys(digests))})  # first: a kill may follow
        write_text(path, text)

    def begin(self, earlier: Sequence[str]) -> None:
        """Begin the record where there is none; an earlier version wrote the ``earlier`` files."""
        if not (self.folder / _RECORD).exists():
            found = [name for name in earlier if (self.folder / name).is_file()]
            write_json(self.folder / _RECORD, {name: [_digest((self.folder / name).read_bytes())] for name in found})

    def _known(self) -> dict[str, list[str]]:
        record = self.folder / _RECORD
        return read_json(record) if record.exists() else {}


def check_places(run: Run) -> None:
    """Raises MoesaicError where a file or folder that this program did not make has the place of one of its own."""
    for part in (run, *run.budgets):
        stages = [part.path / stage.folder_name for stage in STAGES if stage.shared == isinstance(part, Run)]
        for folder in stages:
            check_place(folder)
        files = OwnFiles(part.path)
        files.begin((CONFIGURATION, ENVIRONMENT, SUMMARY) if any(map(has_begun, stages)) else ())
        files.check(ENVIRONMENT, SUMMARY)
        if not files.owns(CONFIGURATION):
            run.reporter.say(f"{part.path / CONFIGURATION} is yours and stays; the settings used are in {ENVIRONMENT}")


def describe(run: Run | BudgetRun, stage: str) -> None:
    """Record the command, versions, device and settings with which a stage begins; a ``config.yaml`` of the user's
    stays."""
    whole, name = (run.run, run.name) if isinstance(run, BudgetRun) else (run, "")
    files, settings = OwnFiles(run.path), whole.loaded.resolved_yaml(name)
    if files.owns(CONFIGURATION):
        files.write(CONFIGURATION, settings)
    path = run.path / ENVIRONMENT
    known: dict[str, Any] = read_json(path) if path.exists() else {}
    facts = {
        "command": sys.argv[1:],
        "versions": versions(),
        "device": str(whole.device),
        "configuration": whole.config.model_dump(mode="json"),
    }
    files.write(ENVIRONMENT, json.dumps(known | {stage: facts}, indent=2) + "\n")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
