"""Atomic writes, so that a killed process or a full disk damages no file; and typed values as JSON."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from moesaic.search_spaces.errors import Damaged, MoesaicError
from moesaic.search_spaces.yaml_source import adapter

T = TypeVar("T")
_TEMPORARY = re.compile(r"\.moesaic-(\d{1,9})-[0-9a-f]{8}\.tmp")
_OLD_SECONDS = 24 * 3600
PathLike = str | os.PathLike[str]


def write_atomically(path: PathLike, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it to ``path``.

    A file that is replaced keeps its permissions, and a symbolic link its place: its target is replaced.

    Raises
    ------
    MoesaicError : the place cannot be written (read-only, full); ``path`` is unchanged.
    OSError : ``write`` failed on another file.
    """
    path = Path(path).resolve() if Path(path).is_symlink() else Path(path)
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if path.exists():
            with suppress(PermissionError):  # on a disk without permissions
                temporary.chmod(path.stat().st_mode & 0o7777)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is not None and Path(os.fsdecode(error.filename)) not in (temporary, path, *path.parents):
            raise
        raise unwritable(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A new name in the folder of ``path``, for what will be renamed to it. ``sweep`` removes leftovers."""
    return path.with_name(f".moesaic-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def replace_folder(folder: Path, new: Path) -> None:
    """Rename the folder ``new``, a sibling, to ``folder``. Files in ``folder`` that ``new`` does not have stay
    there.

    A kill at any moment leaves the old folder, the new one, or what ``complete_replacement`` makes the old one again.
    Raises OSError.
    """
    old = _replaced(folder)
    if folder.exists():
        _keep_others(folder, new)
        sync_folder(new)
        folder.rename(old)
    new.rename(folder)
    sync_folder(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def complete_replacement(folder: Path) -> None:
    """End a replacement of ``folder`` in which the process was killed. Raises OSError."""
    old = _replaced(folder)
    if old.exists():
        shutil.rmtree(old) if folder.exists() else old.rename(folder)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.moesaic-replaced")


def _keep_others(folder: Path, new: Path) -> None:
    for top, folders, names in os.walk(folder):
        for name in (*names, *(name for name in folders if Path(top, name).is_symlink())):
            path = Path(top, name)
            copy = new / path.relative_to(folder)
            if os.path.lexists(copy):
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, copy, follow_symlinks=False)
            except OSError:  # a file system without hard links
                shutil.copy2(path, copy, follow_symlinks=False)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power failure, where the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: Path, below: bool = True, shared: bool = False) -> None:
    """Remove what killed processes of this program left half-written in ``folder``, and ``below`` it.

    The process of a temporary file has ended, or the file is more than a day old. In a folder that containers share,
    only age tells: the same process number is another process there.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            match = _TEMPORARY.fullmatch(name)
            path = Path(parent, name)
            with suppress(OSError):
                if match is None:
                    continue
                if (shared or _alive(int(match[1]))) and time.time() - path.lstat().st_mtime < _OLD_SECONDS:
                    continue
                shutil.rmtree(path) if name in folders and not path.is_symlink() else path.unlink()
        if not below:
            break


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class LineFile:
    """A file that grows by whole lines: an ``append`` is in it completely or, where the disk is full, not at all.

    Opening keeps the first ``size`` bytes. Raises OSError.
    """

    def __init__(self, path: Path, size: int):
        self.path, self._size = path, size
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._handle, size)

    def append(self, text: str, sync: bool = False) -> None:
        """Write lines at once; ``sync`` returns when they are on the disk. Raises MoesaicError where it is full."""
        data = memoryview(text.encode())
        size = self._size + len(data)
        try:
            while data:
                data = data[os.write(self._handle, data) :]
            if sync:
                os.fsync(self._handle)
            self._size = size
        except OSError as error:
            raise unwritable(self.path, error) from None
        finally:
            if self._size != size:
                with suppress(OSError):  # whoever reads the file ignores an incomplete last line
                    os.ftruncate(self._handle, self._size)

    def close(self) -> None:
        with suppress(OSError):  # append has told of a full disk
            os.fsync(self._handle)
        os.close(self._handle)


def unwritable(path: PathLike, error: OSError) -> MoesaicError:
    return MoesaicError(
        f"cannot be written: {error.strerror or error}", where=str(path), allowed="a writable place with free space"
    )


def write_text(path: PathLike, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: PathLike, data: Any) -> None:
    write_text(path, _json(data))


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def write_value(path: PathLike, value: Any, kind: Any = None) -> None:
    """Write a dataclass, or a ``kind`` such as ``list[Row]``, as JSON that ``read_value`` turns into an equal one."""
    write_text(path, value_text(value, kind))


def value_text(value: Any, kind: Any = None) -> str:
    """The text of ``write_value``."""
    return _json(adapter(kind or type(value)).dump_python(value, mode="json"))


def read_value(path: PathLike, kind: type[T]) -> T:
    """A value that ``write_value`` wrote. Raises Damaged for a missing or damaged file, or one of another kind."""
    data = read_json(path)
    try:
        return adapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        problem = f"is damaged or of another version: {place}: {first['msg']}"
        raise Damaged(problem, path, allowed="a file that this version of the program wrote") from None


def read_json(path: PathLike) -> Any:
    """Parsed JSON. Raises Damaged for a missing or damaged file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged("no such file", path) from None
    except OSError as error:
        raise MoesaicError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except ValueError:
        raise Damaged("is damaged: not valid JSON", path, allowed="a file this program wrote") from None
