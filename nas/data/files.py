"""Finds the files of a corpus and assigns each to a split."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moesaic.nas.config import DataConfig
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.errors import nearest_name

SPLITS = ("train", "validation", "test")
FEW_FILES = 20
"""With fewer files, a split by file would be too random: each file is cut into three parts instead."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class TextFile:
    """A file under the ``name`` that decides its split, so that the split is the same on every machine."""

    name: str
    path: Path

    def text(self) -> str | None:
        """Its text, or None if it is not UTF-8 text."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise MoesaicError(f"cannot be read: {error.strerror}", where=str(self.path)) from None
        if b"\0" in data:
            return None
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return None


def find_files(config: DataConfig, where: str) -> list[TextFile]:
    """The corpus's text files in a stable order.

    Raises
    ------
    MoesaicError : a path is missing, a file named directly is not text, or nothing is found.
    """
    found = _standard_library() if config.kind == "stdlib" else _named(config.files, where)
    if not found:
        raise MoesaicError(
            "the corpus is empty: no text file found",
            where=where,
            found=", ".join(config.files) or "no standard library source beside this interpreter",
        )
    return sorted(found, key=lambda file: file.name)


def _standard_library() -> list[TextFile]:
    """Every module's source except test suites, which some Python distributions leave out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [
        TextFile(path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not skipped.intersection(path.relative_to(root).parts) and path.is_file()
    ]


def _named(patterns: list[str], where: str) -> list[TextFile]:
    found: dict[Path, TextFile] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            entries = [(p.relative_to(path).as_posix(), p) for p in path.rglob("*") if p.is_file()]
            named_directly = False
        elif path.is_file():
            entries, named_directly = [(path.name, path)], True
        else:
            entries = [(Path(p).name, Path(p)) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
            named_directly = False
            if not entries:
                siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
                raise MoesaicError(
                    "no such file",
                    where=where,
                    found=pattern,
                    allowed="a text file, a folder or a glob",
                    nearest=nearest_name(path.name, siblings),
                )
        for name, entry in entries:
            file = TextFile(name, entry)
            if file.text() is not None:
                found[entry.resolve()] = file
            elif named_directly:
                raise MoesaicError("is a binary file", where=where, found=pattern, allowed="text in UTF-8")
    return list(found.values())


def split_texts(files: list[TextFile], split: str) -> Iterator[str]:
    """The texts of one split, one file at a time: by a hash of the file's name (90 / 5 / 5 %), or cut by position."""
    for file in files:
        text = file.text()
        if not text:
            continue
        if len(files) >= FEW_FILES:
            bucket = int.from_bytes(hashlib.sha256(file.name.encode()).digest()[:4], "big") % 100
            if SPLITS[0 if bucket < 90 else 1 if bucket < 95 else 2] == split:
                yield text
        else:
            index = SPLITS.index(split)
            cuts = [0, *(_line_end(text, share) for share in (0.90, 0.95)), len(text)]
            if piece := text[cuts[index] : cuts[index + 1]]:
                yield piece


def _line_end(text: str, share: float) -> int:
    """Position after the line at ``share`` of the text, or exactly at ``share`` in a text of one line."""
    at = int(len(text) * share)
    end = text.find("\n", at)
    return end + 1 if 0 <= end < len(text) - 1 else at


def chunks(text: str) -> Iterator[str]:
    """Pieces of about a million characters that end at a line, so that a huge file is not encoded at once."""
    at = 0
    while at < len(text):
        end = text.find("\n", at + _CHUNK)
        end = len(text) if end < 0 else end + 1
        yield text[at:end]
        at = end


def content_hash(files: list[TextFile]) -> str:
    """16 hexadecimal digits of all names and contents."""
    digest = hashlib.sha256()
    for file in files:
        data = file.path.read_bytes()
        digest.update(f"{file.name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()[:16]
