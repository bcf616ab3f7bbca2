"""What describes a family of models: how its configuration is read and written, and what its tensors are called."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.search_spaces import Architecture, MoesaicError
from moesaic.supernet.convert.names import Names

_MISSING = object()


@dataclass
class Settings:
    """``config.json``. A key that is absent has the family's default, as in the program that wrote it.

    ``seen`` collects the keys that were read.
    """

    data: Mapping[str, Any]
    path: Path
    seen: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """Raises MoesaicError where a key without default is absent."""
        self.seen.add(key)
        value = self.data.get(key, default)
        if value is _MISSING:
            raise self.error("a key is missing", key, None, "the key")
        return value

    def spelled(self, *keys: str) -> str:
        """The first of several spellings of a key that is there, or the first."""
        return next((key for key in keys if key in self.data), keys[0])

    def size(self, key: str, default: Any = _MISSING) -> int:
        """A positive integer; ``default`` also where it is null."""
        value = self.get(key, default)
        value = default if value is None and default is not _MISSING else value
        if type(value) is not int or value < 1:
            raise self.error("is not a positive integer", key, value, "1 and more")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A mapping; empty where it is absent or null."""
        value = self.get(key, None)
        if not isinstance(value, dict | None):
            raise self.error("is not a mapping", key, value, "a mapping, or null")
        return value or {}

    def listed(self, key: str) -> list[Any]:
        """A list; empty where it is absent or null."""
        value = self.get(key, None)
        if not isinstance(value, list | None):
            raise self.error("is not a list", key, value, "a list, or null")
        return value or []

    def number(self, key: str, default: Any = _MISSING) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.error("is not a number", key, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """``default`` also where it is null."""
        value = self.get(key, default)
        if not isinstance(value, bool | None):
            raise self.error("is neither true nor false", key, value, "true or false")
        return default if value is None else value

    def only(self, key: str, allowed: Any, default: Any = None) -> None:
        """Raises MoesaicError unless the key is absent, null, or ``allowed``: nothing else has an exact counterpart."""
        value = self.get(key, default)
        if value is not None and value != allowed:
            raise self.error("cannot be represented exactly", key, value, f"{key}: {json.dumps(allowed)}")

    def one_of(self, key: str, names: Mapping[str, str], default: Any = _MISSING) -> str:
        """Our name for the value of a key."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in names:
            raise self.error("cannot be represented exactly", key, value, ", ".join(names))
        return names[value]

    def error(self, problem: str, key: str, found: Any, allowed: Any) -> MoesaicError:
        return MoesaicError(problem, where=f"{self.path}: {key}", found=found, allowed=allowed)


@dataclass(frozen=True)
class Family:
    """Models with one ``model_type``.

    ``read`` gives the architecture that a configuration describes, ``write`` is its inverse where there is one: the
    configuration of an architecture with a vocabulary size (None: it is only read). ``names`` gives the tensors of our
    parameters, for an architecture. ``prefix``: models without a head are stored without it. ``ignored``: ends of
    names of buffers, and of parts that are not read. ``older``: ends of names, and how they were spelt before.
    """

    model_type: str
    title: str
    read: Callable[[Settings], Architecture]
    write: Callable[[Architecture, int], dict[str, Any]] | None
    names: Callable[[Architecture], Names]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    max_length: str = "max_position_embeddings"
    """The key of the longest sequence."""
    older: Mapping[str, str] = field(default_factory=dict)

    def spelt(self, names: Names, tensors: Collection[str]) -> Names:
        """``names`` as the ``tensors`` of a folder are called: without prefix, or in an older spelling."""
        bare = self.prefix and not any(name.startswith(self.prefix) for name in tensors)

        def spelling(name: str) -> str:
            name = name.removeprefix(self.prefix) if bare else name
            if name not in tensors:
                for end, older in self.older.items():
                    old = name.removesuffix(end) + older
                    if name.endswith(end) and old in tensors:
                        return old
            return name

        return {own: [piece.renamed(spelling) for piece in pieces] for own, pieces in names.items()}
