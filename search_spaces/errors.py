"""The exceptions of the project: each message says what is wrong, where, and what is allowed."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class MoesaicError(ValueError):
    """An error that the user can fix. (A ValueError, so that pydantic adds the place if a validator raises it.)

    Parameters
    ----------
    problem : what is wrong, in one sentence.
    where : the place: ``file:line: key`` or a path.
    found : what was there.
    allowed : what may be there.
    nearest : the closest valid value or spelling.
    """

    exit_code = 2

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        found: object = None,
        allowed: object = None,
        nearest: object = None,
    ):
        self.problem, self.where, self.found, self.allowed, self.nearest = problem, where, found, allowed, nearest
        lines = [f"{where}: {problem}" if where else problem]
        for name, value in (("found", found), ("allowed", allowed), ("nearest", nearest)):
            if value is not None:
                lines.append(f"  {name + ':':9}{value}")
        super().__init__("\n".join(lines))


class Damaged(MoesaicError):
    """A file that this program wrote is missing, cut off or changed. ``path`` is the file, ``line`` the place in it."""

    def __init__(self, problem: str, path: str | os.PathLike[str], line: int | None = None, **facts: object):
        super().__init__(problem, where=f"{path}:{line}" if line else str(path), **facts)
        self.path, self.line = Path(path), line


class StageFailed(MoesaicError):
    """The input was valid, but a stage could not finish (training diverged, the machine is too noisy)."""

    exit_code = 1


class Interrupted(MoesaicError):
    """The user or the system stopped the program; what was computed is kept."""

    exit_code = 130


def nearest_name(found: str, allowed: Iterable[str]) -> str | None:
    """The allowed spelling closest to ``found``, or None when nothing is close."""
    matches = difflib.get_close_matches(str(found), [str(a) for a in allowed], n=1, cutoff=0.5)
    return matches[0] if matches else None
