"""The files of parallel text: the pairs in them, and which split a pair belongs to."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal

from moesaic.nas.config import DataConfig
from moesaic.nas.data.cache import expanded
from moesaic.nas.data.file_search import shown
from moesaic.nas.data.files import SPLITS, Split, missing
from moesaic.nas.data.splits import SHARE
from moesaic.nas.data.streams import Checksum
from moesaic.search_spaces import MoesaicError

Side = Literal["source", "target"]
SIDES: tuple[Side, Side] = ("source", "target")


@dataclass(frozen=True)
class PairFiles:
    """The files of a split: source and target, or one TSV; and the digest of each."""

    paths: tuple[Path, ...]
    digests: tuple[str, ...]

    def pairs(self) -> Iterator[tuple[int, str, str]]:
        """(line, source, target), without white space around a sentence.

        Raises
        ------
        MoesaicError : a file is damaged or not UTF-8; two have different numbers of lines; a line of a TSV has not
            exactly one tab.
        """
        if len(self.paths) == 1:
            yield from self._columns()
            return
        source, target = map(_lines, self.paths)
        for number, (one, other) in enumerate(zip_longest(source, target), start=1):
            if one is None or other is None:
                rest = number + sum(1 for _ in (target if one is None else source))
                counts = (number - 1, rest) if one is None else (rest, number - 1)
                raise MoesaicError(
                    "the files have different numbers of lines, and translations are found by their line",
                    where="data.files",
                    found=", ".join(f"{shown(path)}: {count}" for path, count in zip(self.paths, counts, strict=True)),
                    allowed="two files in which a line of one is translated by the same line of the other",
                )
            yield number, one.strip(), other.strip()

    def _columns(self) -> Iterator[tuple[int, str, str]]:
        for number, line in enumerate(_lines(self.paths[0]), start=1):
            columns = line.split("\t")
            if len(columns) != 2:
                raise MoesaicError(
                    "a line needs exactly one tab, between a sentence and its translation",
                    where=f"{shown(self.paths[0])}:{number}",
                    found=f"{len(columns) - 1} tabs",
                )
            yield number, columns[0].strip(), columns[1].strip()

    def of(self, side: Side) -> Path:
        return self.paths[SIDES.index(side) % len(self.paths)]


def find_pairs(config: DataConfig, where: str) -> dict[Split, PairFiles]:
    """The files of each split. Raises MoesaicError where one is missing, or a folder."""
    files: dict[Split, PairFiles] = {}
    for split in SPLITS:
        paths = tuple(expanded(name, where) for name in config.split_files[split])
        for path in paths:
            if path.is_dir():
                raise MoesaicError("is a folder", where=where, found=shown(path), allowed="a file of sentences")
            if not path.is_file():
                raise missing(path, where)
        if paths:
            files[split] = PairFiles(paths, tuple(Checksum.of(path).sha256 for path in paths))
    return files


def _digest(source: str, target: str) -> bytes:
    return hashlib.sha256(f"{source}\t{target}".encode()).digest()[:12]


def _split_of(digest: bytes, without_files: set[Split]) -> Split:
    """Where a pair of the training files goes: by its content, to a split ``without_files`` of its own, or stay."""
    place = int.from_bytes(digest[:4]) / 2**32
    if "test" in without_files and place < SHARE:
        return "test"
    return "validation" if "validation" in without_files and place >= 1 - SHARE else "train"


@dataclass(frozen=True)
class Divided:
    """The pairs of each split. ``held_out`` are the digests of those that have files of their own for validation and
    test, and do not train."""

    files: Mapping[Split, PairFiles]
    held_out: frozenset[bytes]

    @staticmethod
    def of(files: Mapping[Split, PairFiles]) -> Divided:
        held = (files[split].pairs() for split in SPLITS[1:] if split in files)
        return Divided(files, frozenset(_digest(one, other) for _, one, other in chain.from_iterable(held)))

    def pairs(self, split: Split, left_out: Counter[str] | None = None) -> Iterator[tuple[str, str]]:
        """Raises MoesaicError where a sentence for testing is empty. ``left_out`` counts others by reason."""
        left_out = Counter() if left_out is None else left_out
        own = self.files.get(split)
        rest: set[Split] = set(SPLITS) - set(self.files)
        for number, source, target in (own or self.files["train"]).pairs():
            if not (source and target):
                if own and split == "test":
                    side: Side = "target" if source else "source"
                    raise MoesaicError(
                        "empty reference" if side == "target" else "empty sentence to translate",
                        where=f"{shown(own.of(side))}:{number}",
                        allowed="text in every line of the files for testing",
                    )
                left_out["with an empty line"] += own is not None
            elif own and split != "train":
                yield source, target
            elif (digest := _digest(source, target)) in self.held_out:
                left_out["also for validation or testing"] += own is not None
            elif _split_of(digest, rest) == split:
                yield source, target


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file. Only a line feed ends one: other characters that Python's ``splitlines`` knows are text."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield _text(line, path, number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise MoesaicError(f"is damaged: {error}", where=shown(path), allowed="a complete gzip file") from None
    except OSError as error:
        raise MoesaicError(f"cannot be read: {error.strerror}", where=shown(path)) from None


def _text(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise MoesaicError(f"is not UTF-8: {error.reason}", where=f"{shown(path)}:{number}") from None
