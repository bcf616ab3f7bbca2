"""Small corpora for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

from moesaic.nas.config import DataConfig
from moesaic.nas.data.files import Split, find_files
from moesaic.nas.data.splits import divide


def config(files: Path | str | list[str] | dict, **changes) -> DataConfig:
    files = str(files) if isinstance(files, Path) else files
    return DataConfig(**{"kind": "text", "files": files, "vocab_size": 300, "sequence_length": 16, **changes})


def write(folder: Path, texts: dict[str, str | bytes]) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def lines(topic: str, count: int = 40) -> str:
    return "".join(f"{topic} has a line {number}\n" for number in range(count))


def found(files: Path | str | list[str] | dict, own: list[Path] | None = None) -> tuple[set[str], str]:
    """Names of the files found, and what was said."""
    result = find_files(config(files), "run.yaml:3: data.files", own or [])
    return {file.path.name for file in result.files}, "\n".join(result.notes)


def texts_of(files: Path | str | list[str] | dict) -> dict[Split, list[str]]:
    """The texts of each split."""
    pieces = divide(find_files(config(files), "test").files)
    return {split: [text for piece in parts for text in piece.texts()] for split, parts in pieces.items()}
