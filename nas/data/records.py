"""Documents of one file: a text is one document; JSON lines, Parquet and Arrow files hold one per record."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.errors import nearest_name

_LINES = (".jsonl", ".ndjson")
_COLUMNS = (".parquet", ".arrow")
RECORDS = (*_LINES, *_COLUMNS)
"""Ends of the names of files with records, also with ``.gz`` after them where they are JSON lines."""
_GZIP = ".gz"


@dataclass(frozen=True)
class Documents:
    """``texts`` in the order of the file; ``empty`` records had no text."""

    texts: list[str]
    empty: int = 0


def has_records(path: PurePath) -> bool:
    return _inner_suffix(path) in RECORDS


def documents(path: PurePath, data: bytes, field: str, where: str) -> Documents:
    """The documents in ``data``, the bytes of the file ``path``. Of records, ``field`` is the text.

    Raises
    ------
    MoesaicError : a damaged file, a record without the field, a field that is no text; with file and record.
    UnicodeDecodeError : a text that is not UTF-8.
    """
    if path.suffix == _GZIP:
        data = unpacked(data, where)
    kind = _inner_suffix(path)
    if kind in _LINES:
        return _kept(_json_lines(data, field, where))
    if kind in _COLUMNS:
        return _kept(_columns(data, kind, field, where))
    return Documents([data.decode()])


def unpacked(data: bytes, where: str) -> bytes:
    """What a gzip file holds."""
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise MoesaicError(f"is damaged: {error}", where=where, allowed="a complete gzip file") from None


def _inner_suffix(path: PurePath) -> str:
    return path.with_suffix("").suffix.lower() if path.suffix == _GZIP else path.suffix.lower()


def _kept(values: Iterable[str | None]) -> Documents:
    found = list(values)
    texts = [text for text in found if text and text.strip()]
    return Documents(texts, len(found) - len(texts))


def _json_lines(data: bytes, field: str, where: str) -> Iterator[str | None]:
    for number, line in enumerate(io.BytesIO(data), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise MoesaicError(
                f"is not JSON: {error}", where=f"{where}:{number}", allowed="an object per line"
            ) from None
        if not isinstance(record, dict):
            raise MoesaicError("is not a JSON object", where=f"{where}:{number}", allowed="an object per line")
        yield _text(record, field, f"{where}:{number}")


def _text(record: dict[str, Any], field: str, where: str) -> str | None:
    if field not in record:
        raise _no_field(field, list(record), where)
    value = record[field]
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        raise MoesaicError(f"the field {field} is no text", where=where, found=kind, allowed="a string, or null")
    return value


def _no_field(field: str, names: list[str], where: str) -> MoesaicError:
    nearest = nearest_name(field, names)
    return MoesaicError(
        f"a record has no field {field}",
        where=where,
        found=", ".join(map(str, names)) or "no fields",
        allowed="data.field: the name of the field with the text",
        nearest=nearest and f"data.field={nearest}",
    )


def _columns(data: bytes, kind: str, field: str, where: str) -> Iterator[str | None]:
    """The column ``field``, a batch of rows at a time."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise MoesaicError(
            "pyarrow reads this file and is not installed", where=where, nearest="pip install 'moesaic[data]'"
        ) from None
    try:
        if kind == ".parquet":
            file = parquet.ParquetFile(io.BytesIO(data))
            schema = file.schema_arrow
            batches = file.iter_batches(columns=[field] if field in schema.names else [])
        else:
            reader = _arrow_reader(ipc, data)
            schema, batches = reader.schema, iter(reader)
        if field not in schema.names:
            raise _no_field(field, schema.names, where)
        if not (
            pyarrow.types.is_string(schema.field(field).type) or pyarrow.types.is_large_string(schema.field(field).type)
        ):
            found = str(schema.field(field).type)
            raise MoesaicError(f"the field {field} is no text", where=where, found=found, allowed="strings")
        for batch in batches:
            yield from batch.column(field).to_pylist()
    except pyarrow.ArrowException as error:
        raise MoesaicError(f"is damaged: {error}", where=where, allowed=f"a complete {kind} file") from None


def _arrow_reader(ipc: Any, data: bytes) -> Any:
    """Batches of a stream, the format of ``datasets``, or of a file, which starts with a mark."""
    if data.startswith(b"ARROW1"):
        reader = ipc.open_file(io.BytesIO(data))
        return _FileBatches(reader)
    return ipc.open_stream(io.BytesIO(data))


@dataclass(frozen=True)
class _FileBatches:
    reader: Any

    @property
    def schema(self) -> Any:
        return self.reader.schema

    def __iter__(self) -> Iterator[Any]:
        return (self.reader.get_batch(index) for index in range(self.reader.num_record_batches))
