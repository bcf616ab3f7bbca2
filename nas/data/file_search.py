"""Searches the disk for files by path, folder or glob, without those that are no part of anybody's corpus."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

_BACKUP = re.compile(r".*(~|\.bak|\.orig|\.swp|\.swo)|#.*#", re.DOTALL)
_SHOWN = 3
"""Names shown of files that were left out for one reason."""


class FileSearch:
    """Finds files, and notes those left out.

    A path that exists is taken as it is, whatever its characters; otherwise ``*``, ``?``, ``[...]`` and ``**`` match
    names. Links are followed, each folder is entered once. Left out are hidden files and folders, backup copies of
    editors, the ``own`` files and folders of this program, runs of it, and the file that its output goes to.
    What is named literally is never left out. Folders named in ``outside`` are not searched at all.
    """

    def __init__(self, own: Iterable[Path] = (), outside: Iterable[str] = ()):
        self._own = {os.path.realpath(path) for path in own}
        self._outside = frozenset(outside)
        self._outputs = _outputs()
        self._left_out: dict[str, dict[Path, None]] = {}
        self._named: set[Path] = set()
        self._notes: list[str] = []
        self._roots: list[Path] = []

    def find(self, pattern: Path) -> dict[Path, str]:
        """Files that match, or are in a folder that matches, by their names below the literal part of ``pattern``."""
        root, parts = Path(pattern.anchor), pattern.parts[1:] if pattern.anchor else pattern.parts
        while parts and (not _magic(parts[0]) or os.path.lexists(root / parts[0])):
            root, parts = root / parts[0], parts[1:]
        if not parts and os.path.isfile(root):
            self._named.add(root)
            root, parts = root.parent, (root.name,)
        self._roots.append(root)
        visited: set[tuple[str, tuple[str, ...]]] = set()
        files: dict[Path, str] = {}
        for match in self._matches(root, parts, visited):
            inside = self._matches(match, ("**", "*"), visited) if os.path.isdir(match) else [match]
            for path in inside:
                if os.path.isfile(path):
                    files[path] = path.relative_to(root).as_posix()
                elif not os.path.isdir(path) and os.path.lexists(path):
                    self.leave_out("broken link" if path.is_symlink() else "not a regular file", path)
        return files

    def named_directly(self, path: Path) -> bool:
        return path in self._named

    def leave_out(self, reason: str, path: Path) -> None:
        self._left_out.setdefault(reason, {})[path] = None

    def note(self, text: str) -> None:
        """Something that the summary tells of a file that is not left out."""
        self._notes.append(text)

    def summary(self) -> str:
        """What was left out, in one line: how many for each reason, and the names of the first."""
        parts = []
        for reason, paths in self._left_out.items():
            names = ", ".join(sorted(shown(self._name(path)) for path in paths)[:_SHOWN])
            parts.append(f"{len(paths)} {reason} ({names}{', ...' if len(paths) > _SHOWN else ''})")
        left_out = [f"left out: {', '.join(parts)}"] if parts else []
        return "; ".join([*left_out, *self._notes])

    def _name(self, path: Path) -> Path:
        return next((path.relative_to(root) for root in reversed(self._roots) if path.is_relative_to(root)), path)

    def _matches(self, root: Path, parts: tuple[str, ...], visited: set[tuple[str, tuple[str, ...]]]) -> Iterator[Path]:
        """Paths below ``root`` that match the names ``parts``. ``visited`` ends loops of links."""
        waiting = [(root, parts)]
        while waiting:
            path, parts = waiting.pop()
            if not parts:
                yield path
                continue
            state = os.path.realpath(path), parts
            if state in visited:
                continue
            visited.add(state)
            head, rest = parts[0], parts[1:]
            if head == "**":
                waiting.append((path, rest))
                waiting += [(entry, parts) for entry in self._entries(path, "*") if os.path.isdir(entry)]
            elif not _magic(head) or os.path.lexists(path / head):
                waiting.append((path / head, rest))
            else:
                waiting += [(entry, rest) for entry in self._entries(path, head)]

    def _entries(self, folder: Path, pattern: str) -> list[Path]:
        """What is in ``folder`` under a name that matches, without what is to be left out."""
        try:
            names = os.listdir(folder)
        except NotADirectoryError:
            return []
        except OSError:
            self.leave_out("unreadable", folder)
            return []
        wanted = []
        for path in (folder / name for name in names if fnmatchcase(name, pattern) and name not in self._outside):
            if reason := self._reason(path, pattern):
                self.leave_out(reason, path)
            else:
                wanted.append(path)
        return wanted

    def _reason(self, path: Path, pattern: str) -> str | None:
        if path.name.startswith(".") and not pattern.startswith("."):
            return "hidden"
        if _BACKUP.fullmatch(path.name) and not _BACKUP.fullmatch(pattern):
            return "backup"
        if os.path.realpath(path) in self._own or _is_run(path) or self._is_output(path):
            return "of this program"
        return None

    def _is_output(self, path: Path) -> bool:
        with suppress(OSError):
            return any(os.path.samestat(os.stat(path), output) for output in self._outputs)
        return False


def shown(path: Path) -> str:
    """A path for people: bytes that are no UTF-8, and characters that do not print, as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _magic(name: str) -> bool:
    return any(character in name for character in "*?[")


def _is_run(path: Path) -> bool:
    """Whether ``path`` is the folder of a run."""
    return all(os.path.isfile(path / name) for name in (".lock", "env.json"))


def _outputs() -> list[os.stat_result]:
    """The files that standard output and standard error go to."""
    found = []
    for descriptor in (1, 2):
        with suppress(OSError):  # closed
            found.append(os.fstat(descriptor))
    return found
