"""Finds the text files of a corpus, and says which files were left out and why."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from moesaic.nas.config import DataConfig
from moesaic.nas.data.cache import cache_directory, expanded
from moesaic.nas.data.file_search import FileSearch, shown
from moesaic.nas.data.records import documents, has_records, unpacked
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.errors import nearest_name

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""Words in names of files and folders that tell the split."""
_ABOUT = {"readme", "license", "licence", "copying", "citation", "notice"}
"""Words in names of files that come with a data set and belong to none of its splits."""
_NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
"""Folders beside the standard library that are no part of it, and test suites, which some distributions leave out."""


_ABOUT_DATASET = {"dataset_dict.json", "dataset_info.json", "state.json"}
"""Files that Hugging Face's ``datasets`` saves beside those with the data."""


@dataclass(frozen=True)
class TextFile:
    """A text file, or one of records, whose text is in ``field``. Its ``digest``, that of its bytes, identifies it
    wherever it is; ``split`` is its own, if any."""

    path: Path
    digest: str
    size: int
    split: Split | None = None
    field: str = "text"

    def texts(self) -> list[str]:
        """Its documents. Raises MoesaicError when it cannot be read any more, or was changed since it was found."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise MoesaicError(f"cannot be read: {error.strerror}", where=shown(self.path)) from None
        if _digest(data) != self.digest:
            raise MoesaicError(
                "was changed while the corpus was read", where=shown(self.path), allowed="a file that stays as it is"
            )
        return documents(self.path, data, self.field, shown(self.path)).texts


@dataclass(frozen=True)
class Found:
    """The text files of a corpus, each content once, in an order that names and places do not affect; and lines that
    tell the user what was found and left out."""

    files: list[TextFile]
    notes: list[str]


def find_files(config: DataConfig, where: str, own: Iterable[Path] = ()) -> Found:
    """The text files of ``config``. ``own`` files and folders are this program's own and no part of a corpus.

    Raises
    ------
    MoesaicError : a path is missing, a file named directly is not text, or nothing is found.
    """
    search = FileSearch([*own, cache_directory()], _NOT_LIBRARY if config.kind == "stdlib" else ())
    wanted = _patterns(config)
    found: dict[tuple[str, Split | None], TextFile] = {}
    names: dict[Path, str] = {}
    for split, patterns in wanted.items():
        for pattern in patterns:
            matches = search.find(pattern)
            if not matches and not os.path.isdir(pattern):
                raise missing(pattern, where)
            for path, name in matches.items():
                key = os.path.realpath(path), split
                if key not in found and (file := _read(path, split, search, where, config.field)):
                    found[key], names[path] = file, name
    files, notes = list(found.values()), []
    if None in wanted and config.kind == "text":
        files, notes = _own_splits(files, names, search)
    files = _each_once(files, search)
    left_out = search.summary()
    if not files:
        raise MoesaicError("the corpus is empty: its files hold no text", where=where, found=left_out or None)
    for split, patterns in wanted.items():
        if split and patterns and not any(file.split == split for file in files):
            raise MoesaicError(f"the files for {split} hold no text of their own", where=where, found=left_out or None)
    size = sum(file.size for file in files)
    amount = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
    notes.append(f"{len(files)} text {'file' if len(files) == 1 else 'files'}, {amount}{left_out and '; ' + left_out}")
    return Found(files, notes)


def absolute_files(config: DataConfig) -> DataConfig:
    """``config`` with absolute paths and globs, which mean the same in every working directory."""
    if config.tokenizer is not None:
        path = str(expanded(config.tokenizer, "data.tokenizer").absolute())
        config = config.model_copy(update={"tokenizer": path})

    def absolute(patterns: Sequence[str]) -> list[str]:
        return [str(expanded(pattern, "data.files").absolute()) for pattern in patterns]

    if isinstance(config.files, list):
        return config.model_copy(update={"files": absolute(config.files)})
    given = {split: absolute(getattr(config.files, split)) for split in SPLITS}
    return config.model_copy(update={"files": config.files.model_copy(update=given)})


def _patterns(config: DataConfig) -> dict[Split | None, list[Path]]:
    """What to look for, for each split that the user gives, or for all."""
    if config.kind == "stdlib":
        return {None: [Path(sysconfig.get_paths()["stdlib"], "**", "*.py")]}
    if isinstance(config.files, list):
        return {None: [expanded(pattern, "data.files") for pattern in config.files]}
    return {split: [expanded(p, "data.files") for p in getattr(config.files, split)] for split in SPLITS}


def _read(path: Path, split: Split | None, search: FileSearch, where: str, field: str) -> TextFile | None:
    """The file, or None if it is left out."""
    if _is_about_dataset(path) and not search.named_directly(path):
        search.leave_out("about the data", path)
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        data, problem = b"", f"unreadable ({error.strerror})"
    else:
        problem = _no_records(path, data, field, search) if has_records(path) else _no_text(_plain(path, data))
    if problem is None:
        return TextFile(path, _digest(data), len(_plain(path, data)), split, field)
    if problem != "empty" and search.named_directly(path):
        raise MoesaicError(f"the file is {problem}", where=where, found=shown(path), allowed="text in UTF-8")
    search.leave_out(problem, path)
    return None


def _is_about_dataset(path: Path) -> bool:
    beside = (path.parent, *(entry for entry in path.parent.iterdir() if entry.is_dir()))
    return path.name in _ABOUT_DATASET and any(folder.glob("*.arrow") for folder in beside)


def _plain(path: Path, data: bytes) -> bytes:
    return unpacked(data, shown(path)) if path.suffix == ".gz" else data


def _no_records(path: Path, data: bytes, field: str, search: FileSearch) -> str | None:
    """``empty`` for a file without texts; records without text are noted. Raises MoesaicError for other damage."""
    found = documents(path, data, field, shown(path))
    if found.empty and found.texts:
        search.note(f"{found.empty} of {found.empty + len(found.texts)} records without text in {shown(path)}")
    return None if found.texts else "empty"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _no_text(data: bytes) -> str | None:
    """Why ``data`` is no text to learn from, or None if it is."""
    if not data.strip():
        return "empty"
    if b"\0" in data:
        return "binary"
    try:
        data.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return None


def _own_splits(files: list[TextFile], names: dict[Path, str], search: FileSearch) -> tuple[list[TextFile], list[str]]:
    """Files with the splits that their names tell, if all names do so without doubt; and a line that says so."""
    words = {file: re.findall(r"[a-z]+", names[file.path].lower()) for file in files}
    told = {file: {_WORDS[word] for word in found if word in _WORDS} for file, found in words.items()}
    clear = {split for splits in told.values() if len(splits) == 1 for split in splits}
    if len(clear) < 2:
        return files, []
    about = {file for file in files if not told[file] and _ABOUT.intersection(words[file])}
    doubtful = [file for file in files if len(told[file]) != 1 and file not in about]
    if doubtful or "train" not in clear:
        reason = f"{shown(Path(names[doubtful[0].path]))} does not name one" if doubtful else "none is for training"
        return files, [
            f"some files are named after splits, but {reason}: all are divided by content "
            "(data.files: {train: ..., validation: ..., test: ...} says which is which)"
        ]
    for file in about:
        search.leave_out("about the data", file.path)
    divided = [replace(file, split=min(told[file])) for file in files if file not in about]
    counts = Counter(file.split for file in divided)
    return divided, [
        f"split by file names: {', '.join(f'{counts[split]} {split}' for split in SPLITS if counts[split])}"
    ]


def _each_once(files: list[TextFile], search: FileSearch) -> list[TextFile]:
    """Files with different contents, sorted by digest. Of equal ones, that for testing or validation stays, since text
    that was trained on measures nothing."""
    kept: dict[str, TextFile] = {}
    for file in sorted(files, key=lambda file: (-SPLITS.index(file.split or "train"), file.path)):
        if file.digest in kept:
            search.leave_out("repeated", file.path)
        else:
            kept[file.digest] = file
    return sorted(kept.values(), key=lambda file: file.digest)


def missing(path: Path, where: str) -> MoesaicError:
    """The error of a ``path`` that is no file, with the nearest name beside it."""
    if os.path.lexists(path):
        return MoesaicError(
            "is no file and no folder", where=where, found=shown(path), allowed="a text file or a folder"
        )
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    return MoesaicError(
        "no such file",
        where=where,
        found=shown(path),
        allowed="a text file, a folder or a glob; a relative one starts at the current folder",
        nearest=nearest_name(path.name, [shown(Path(name)) for name in siblings]),
    )
