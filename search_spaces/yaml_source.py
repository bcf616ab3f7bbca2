"""YAML with line numbers, so that every error names file, line and key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from moesaic.search_spaces.errors import MoesaicError, nearest_name

T = TypeVar("T")
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class YamlSource:
    """Parsed YAML with the line of every key; ``name`` is the file (or "command line", "preset small").

    ``data`` may be a part of the file, the one at ``prefix``. A key that comes from elsewhere (the command line) has
    that place in ``lines`` instead of a number.
    """

    name: str
    data: Any
    lines: Mapping[KeyPath, int | str] = field(default_factory=dict)
    prefix: KeyPath = ()

    def at(self, *path: str | int, data: Any = None) -> YamlSource:
        """The part at ``path``, with ``data`` as its content if given."""
        if data is None:
            data = self.data
            for part in path:
                data = data[part]
        return YamlSource(self.name, data, self.lines, (*self.prefix, *path))

    def where(self, path: KeyPath = ()) -> str:
        """``file:line: key`` of a key path; a missing key gets the line of its nearest parent."""
        path = (*self.prefix, *path)
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        line = self.lines.get(known)
        place = line if isinstance(line, str) else f"{self.name}:{line}" if line else self.name
        return f"{place}: {dotted(path)}" if path else place


def dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def read_yaml(path: str | os.PathLike[str]) -> YamlSource:
    """Read one YAML file.

    Raises
    ------
    MoesaicError : the file is missing or not text, or has a syntax error or a duplicate key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise MoesaicError(
            "no such file", where=str(path), nearest=nearest_name(path.name, siblings), allowed="a YAML file"
        ) from None
    except IsADirectoryError:
        raise MoesaicError("is a directory", where=str(path), allowed="a YAML file") from None
    except UnicodeDecodeError:
        raise MoesaicError("is not a text file", where=str(path), allowed="a YAML file in UTF-8") from None
    except OSError as error:
        raise MoesaicError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> YamlSource:
    """Parse YAML text to plain data only (``yaml.SafeLoader``). Raises MoesaicError for a syntax error."""
    try:
        data = yaml.load(text, Loader=_Loader)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise MoesaicError(f"YAML syntax error: {error.problem or error.context}", where=where) from None
    except yaml.YAMLError as error:
        raise MoesaicError(f"YAML syntax error: {error}", where=name) from None
    except RecursionError:
        raise MoesaicError("YAML is nested too deeply", where=name) from None
    return YamlSource(name, data, dict(_key_lines(root, (), name, set())) if root else {})


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads numbers as they are written, and whose errors have the line of a value that it cannot
    convert (``2024-13-45``).

    YAML 1.1 reads 010 as 8, 1:30 as 90 and 1e-3 as a string; YAML 1.2 reads 10, a string and 0.001.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError):
            problem = f"{node.value} is not a valid {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = loader.construct_scalar(node).replace("_", "").lower()
    sign, digits = (-1 if text.startswith("-") else 1), text.lstrip("+-")
    if digits[:2] in ("0x", "0o", "0b"):
        return sign * int(digits, 0)
    return int(text) if digits.isdecimal() else float(text.replace(".inf", "inf").replace(".nan", "nan"))


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_DECIMAL = r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
_NUMBERS = {
    _INT: r"[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)",
    _FLOAT: rf"{_DECIMAL}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
# A copy, so that yaml.SafeLoader itself keeps YAML 1.1.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), list("-+.0123456789"))
    _Loader.add_constructor(_tag, _number)


def _key_lines(node: yaml.Node, path: KeyPath, name: str, walked: set[int]) -> Iterator[tuple[KeyPath, int]]:
    if id(node) in walked:  # an alias is the node of its anchor, and may contain itself
        return
    walked.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: dict[Any, int] = {}
        for key_node, value_node in node.value:
            key = yaml.load(key_node.value, _Loader) if key_node.tag == _INT else key_node.value
            line = key_node.start_mark.line + 1
            if key in seen:
                raise MoesaicError(
                    f"duplicate key (first on line {seen[key]})", where=f"{name}:{line}: {dotted((*path, key))}"
                )
            seen[key] = line
            yield (*path, key), line
            yield from _key_lines(value_node, (*path, key), name, walked)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item.start_mark.line + 1
            yield from _key_lines(item, (*path, index), name, walked)


def validate(kind: type[T], source: YamlSource) -> T:
    """``source.data`` as a ``kind`` (a pydantic model or a dataclass).

    Raises
    ------
    MoesaicError : the data is not valid; with the place of the first error and the nearest valid key.
    """
    try:
        return adapter(kind).validate_python(source.data)
    except ValidationError as error:
        raise _explain(kind, error, source) from None


@lru_cache(maxsize=64)
def adapter(kind: Any) -> TypeAdapter:
    """Cached, since building a TypeAdapter takes milliseconds."""
    return TypeAdapter(kind)


def _explain(kind: Any, error: ValidationError, source: YamlSource) -> MoesaicError:
    details = error.errors()
    # A misspelt key often causes "missing" errors beside it, so it is reported first.
    first = next((d for d in details if d["type"] in ("extra_forbidden", "unexpected_keyword_argument")), details[0])
    location = _yaml_path(first["loc"], source.data)
    found: object = first.get("input")
    context = first.get("ctx", {})
    allowed: object = None
    nearest: object = None
    problem = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        names = _field_names(kind, location[:-1])
        problem, found, allowed = "unknown key", location[-1], ", ".join(names)
        nearest = nearest_name(str(location[-1]), names)
    elif first["type"] in ("missing", "missing_argument"):
        problem, found = "missing key", None
    elif first["type"] == "int_type" and isinstance(found, float) and found.is_integer():
        problem, nearest = "not a whole number", int(found)
    elif first["type"] == "literal_error":
        allowed = str(context["expected"])
        choices = [c.strip().strip("'") for c in allowed.replace(" or ", ",").split(",")]
        problem, nearest = "not one of the choices", nearest_name(str(found), choices)
    elif isinstance(cause := context.get("error"), MoesaicError):
        problem, allowed, nearest = cause.problem, cause.allowed, cause.nearest
        found = cause.found if cause.found is not None else found
    if isinstance(found, dict):
        found = None  # a rule between keys: the message names them
    text = None if found is None else str(found) if len(str(found)) <= 120 else str(found)[:117] + "..."
    return MoesaicError(problem, where=source.where(location), found=text, allowed=allowed, nearest=nearest)


def _yaml_path(location: tuple[int | str, ...], data: Any) -> KeyPath:
    """The part of a pydantic location that is in the YAML (without union branches and the like)."""
    path: list[str | int] = []
    for index, part in enumerate(location):
        last = index == len(location) - 1
        here: Mapping[Any, Any] = {}
        if isinstance(data, Mapping):
            here = data
        elif isinstance(data, list | tuple):
            here = dict(enumerate(data))
        if part in here:
            path.append(part)
            data = here[part]
        elif last and isinstance(data, Mapping) and isinstance(part, str) and part.replace("-", "_").isidentifier():
            path.append(part)  # a missing key
    return tuple(path)


def _field_names(kind: Any, path: KeyPath) -> list[str]:
    """Field names of the model at ``path`` below ``kind``."""
    for part in path:
        if isinstance(part, int):
            continue
        kind = _inner_model(_field_types(kind).get(str(part), kind))
    return sorted(_field_types(_inner_model(kind)))


def _field_types(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {info.alias or name: info.annotation for name, info in kind.model_fields.items()}
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return {f.name: hints[f.name] for f in fields(kind) if f.init}
    return {}


def _inner_model(kind: Any) -> Any:
    """The model inside ``tuple[Model, ...]``, ``Model | None``, ``dict[int, Model]``; ``kind`` itself otherwise."""
    if _field_types(kind):
        return kind
    return next((inner for inner in map(_inner_model, get_args(kind)) if _field_types(inner)), kind)
