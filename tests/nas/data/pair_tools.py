"""A small made-up language pair: a word is translated by a word, and two neighbours change places."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

from moesaic.nas.config import DataConfig

WORDS = {
    "cat": "Katze", "dog": "Hund", "sees": "sieht", "a": "eine", "red": "rote", "green": "grüne", "ball": "Kugel",
    "and": "und", "the": "die", "big": "große", "runs": "läuft", "near": "bei", "water": "Wasser", "one": "ein",
}  # fmt: skip


def translated(source: str) -> str:
    """The only right translation."""
    words = [WORDS[word] for word in source.split()]
    for place in range(0, len(words) - 1, 2):
        words[place], words[place + 1] = words[place + 1], words[place]
    return " ".join(words)


def sentences(count: int, seed: int = 0, longest: int = 9) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices([*WORDS], k=rng.randint(2, longest))) for _ in range(count)]


def write_pair(folder: Path, name: str, pairs: list[tuple[str, str]], packed: bool = False) -> list[str]:
    """Two files, source and target; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for side, suffix in enumerate(("en", "de")):
        text = "".join(pair[side] + "\n" for pair in pairs).encode()
        path = folder / f"{name}.{suffix}{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(text) if packed else text)
        paths.append(str(path))
    return paths


def write_corpus(folder: Path, count: int = 600, seed: int = 0) -> dict[str, list[str]]:
    """``data.files`` of three splits without a common pair."""
    texts = list(dict.fromkeys(sentences(2 * count, seed)))[: count + 80]
    pairs = [(text, translated(text)) for text in texts]
    parts = {"train": pairs[80:], "validation": pairs[:40], "test": pairs[40:80]}
    return {split: write_pair(folder, split, part) for split, part in parts.items()}


def config(files: dict[str, list[str]] | list[str], **changes) -> DataConfig:
    return DataConfig(**{"kind": "parallel", "files": files, "vocab_size": 450, "sequence_length": 24, **changes})
