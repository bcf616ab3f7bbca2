"""Atomic writes, so that a killed process or a full disk damages no file; and typed values as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from moesaic.search_spaces.errors import MoesaicError
from moesaic.search_spaces.yaml_source import adapter

T = TypeVar("T")
PathLike = str | os.PathLike[str]


def write_atomically(path: PathLike, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it to ``path``.

    Raises
    ------
    MoesaicError : the place cannot be written (read-only, full); ``path`` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None


def unwritable(path: PathLike, error: OSError) -> MoesaicError:
    return MoesaicError(
        f"cannot be written: {error.strerror or error}", where=str(path), allowed="a writable place with free space"
    )


def write_text(path: PathLike, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: PathLike, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def write_value(path: PathLike, value: Any, kind: Any = None) -> None:
    """Write a dataclass, or a ``kind`` such as ``list[Row]``, as JSON that ``read_value`` turns into an equal one."""
    write_json(path, adapter(kind or type(value)).dump_python(value, mode="json"))


def read_value(path: PathLike, kind: type[T]) -> T:
    """A value that ``write_value`` wrote. Raises MoesaicError for a missing or damaged file, or one of another kind."""
    data = read_json(path)
    try:
        return adapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise MoesaicError(
            f"is damaged or of another version: {place}: {first['msg']}",
            where=str(path),
            allowed="a file that this version of the program wrote",
        ) from None


def read_json(path: PathLike) -> Any:
    """Parsed JSON. Raises MoesaicError for a missing or damaged file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoesaicError("no such file", where=str(path)) from None
    except OSError as error:
        raise MoesaicError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except ValueError:
        raise MoesaicError("is damaged: not valid JSON", where=str(path), allowed="a file this program wrote") from None
