"""Token streams on disk: a folder with a tokenizer and a stream per split, described by lengths and checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
from tokenizers import Tokenizer

from moesaic.nas.data.cache import make_folder
from moesaic.nas.data.files import Split
from moesaic.nas.data.splits import chunks
from moesaic.nas.data.tokenizer import end_of_text, vocab_size
from moesaic.search_spaces import Damaged, MoesaicError
from moesaic.search_spaces.files import read_value, write_value

TOKENIZER = "tokenizer.json"
_FACTS = "corpus.json"


@dataclass(frozen=True)
class Stream:
    """Tokens [N] of a split, and how many bytes of text they encode."""

    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class Checksum:
    size: int
    sha256: str

    @staticmethod
    def of(path: Path) -> Checksum:
        with open(path, "rb") as file:
            return Checksum(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


class Facts(Protocol):
    """``corpus.json``: what is in a folder of the cache. ``files`` are checked when it is opened."""

    @property
    def files(self) -> dict[str, Checksum]: ...


F = TypeVar("F", bound=Facts)


@dataclass(frozen=True)
class StreamFacts:
    """``Facts`` of token streams."""

    vocab_size: int
    dtype: Literal["uint16", "uint32"]
    streams: dict[str, Stream]
    files: dict[str, Checksum]


def id_type(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The type of token ids on disk."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def stream_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.tokens"


def write_streams(folder: Path, tokenizer: Tokenizer, texts: Mapping[Split, Iterable[str]]) -> StreamFacts:
    """Encode the ``texts`` of each split. Raises OSError."""
    (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    size = vocab_size(tokenizer)
    dtype = id_type(size)
    streams = {split: _encode(tokenizer, found, stream_path(folder, split), dtype) for split, found in texts.items()}
    files = [folder / TOKENIZER, *(stream_path(folder, split) for split in texts)]
    facts = StreamFacts(size, dtype, streams, checksums(files))
    write_facts(folder, facts)
    return facts


def checksums(files: Iterable[Path]) -> dict[str, Checksum]:
    """By name, for ``Facts.files``."""
    return {path.name: Checksum.of(path) for path in files}


def write_facts(folder: Path, facts: Facts) -> None:
    """Write what ``checked`` reads."""
    write_value(folder / _FACTS, facts)


def cached(directory: Path, kind: type[F], fill: Callable[[Path], object], say: Callable[[str], None]) -> F:
    """The facts of the folder ``directory`` in the cache, which ``fill`` writes where it is missing or damaged."""
    try:
        return checked(directory, kind)
    except MoesaicError as error:
        if directory.exists():
            say(f"the cached corpus is damaged and is made again: {error.where}: {error.problem}")
    make_folder(directory, fill, lambda folder: _sound(folder, kind))
    return checked(directory, kind)


def _sound(folder: Path, kind: type[Facts]) -> bool:
    try:
        checked(folder, kind)
    except MoesaicError:
        return False
    return True


def checked(folder: Path, kind: type[F]) -> F:
    """The facts of a folder whose files are as they were written.

    Raises
    ------
    Damaged : a file is missing, cut or changed.
    """
    facts = read_value(folder / _FACTS, kind)
    for name, written in facts.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            problem = "was cut" if size < written.size else "was changed" if Checksum.of(path) != written else None
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        if problem:
            raise Damaged(problem, path, allowed="the same command again, which rebuilds it")
    return facts


def _encode(tokenizer: Tokenizer, texts: Iterable[str], path: Path, dtype: str) -> Stream:
    """Append each text and an end-of-text token to ``path``, in pieces, so that a corpus may exceed memory.

    No other special tokens are added: those of a sentence's start or end would stand amid the windows of a text.
    """
    tokens = text_bytes = 0
    end = end_of_text(tokenizer)
    with open(path, "wb") as file:
        for text in texts:
            pieces = list(chunks(text))
            for index, encoding in enumerate(tokenizer.encode_batch(pieces, add_special_tokens=False)):
                last = index == len(pieces) - 1 and end is not None
                ids = [*encoding.ids, end] if last else encoding.ids
                file.write(np.asarray(ids, dtype=dtype).tobytes())
                tokens += len(ids)
            text_bytes += len(text.encode())
    return Stream(tokens, text_bytes)
