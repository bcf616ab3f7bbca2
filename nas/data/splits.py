"""Divides text files into training, validation and test, by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from moesaic.nas.data.files import SPLITS, Split, TextFile
from moesaic.nas.data.records import has_records

SHARE = 0.05
"""Share of the text that validation and test each take from training text, where no files are given for them."""
_LEAST = 0.01
"""They get files until they have this share, wherever the hashes fall."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A file, or the part of it from ``start`` to ``end``, as shares of its length."""

    file: TextFile
    start: float = 0.0
    end: float = 1.0

    @property
    def size(self) -> float:
        """In bytes, about."""
        return self.file.size * (self.end - self.start)

    def texts(self) -> list[str]:
        """Its documents: a share of the records, or of the one text."""
        texts = self.file.texts()
        if has_records(self.file.path):
            return texts[int(len(texts) * self.start) : int(len(texts) * self.end)]
        return [part for text in texts if (part := text[_cut(text, self.start) : _cut(text, self.end)])]


def divide(files: Sequence[TextFile]) -> dict[Split, list[Piece]]:
    """The text of each split, from ``files`` with different contents.

    Files with a split of their own stay in it. Where there are none for validation or test, training text is divided:
    a file that holds more than a twentieth of it is cut into parts, any other goes as a whole where the hash of its
    content says. So a file's split depends on no name, and on other files only near those limits: if the hashes give
    validation or test less than a hundredth of the text, the files with the nearest hashes are taken.
    """
    found: dict[Split, list[Piece]] = {split: [Piece(f) for f in files if f.split == split] for split in SPLITS}
    missing: list[Split] = [split for split in SPLITS[1:] if not found[split]]
    training = [file for file in files if file.split in (None, "train")]
    total = sum(file.size for file in training)
    large = [file for file in training if missing and file.size > SHARE * total]
    whole = set(training).difference(large)
    starts = [1 - SHARE * len(missing[index:]) for index in range(len(missing))]
    ends = [*starts, 1.0]
    for index, split in enumerate(missing):
        found[split] = [Piece(file, starts[index], ends[index + 1]) for file in large]
        least = _LEAST * total - sum(piece.size for piece in found[split])
        taken = _nearest(whole, _place if split == "test" else lambda file: 1 - _place(file), least)
        found[split] += map(Piece, taken)
        whole.difference_update(taken)
    found["train"] = [Piece(file, 0.0, ends[0]) for file in large]
    found["train"] += [Piece(file) for file in training if file in whole]
    return found


def _nearest(files: Iterable[TextFile], distance: Callable[[TextFile], float], least: float) -> list[TextFile]:
    """Files within a distance of ``SHARE``, and further ones until they have ``least`` bytes."""
    taken: list[TextFile] = []
    for file in sorted(files, key=lambda file: (distance(file), file.digest)):
        if distance(file) >= SHARE and least <= 0:
            break
        taken.append(file)
        least -= file.size
    return taken


def _place(file: TextFile) -> float:
    """A number in [0, 1), uniformly distributed over contents."""
    return int(file.digest[:8], 16) / 2**32


def _cut(text: str, share: float) -> int:
    """Position at ``share`` of the text: after a line or a word if one ends soon, so that parts are not empty."""
    at = int(len(text) * share)
    if 0 < at < len(text):
        for separator in ("\n", " "):
            end = text.find(separator, at, at + len(text) // 50)
            if end >= 0:
                return end + 1
    return at


def chunks(text: str) -> Iterator[str]:
    """Pieces of about a million characters, at most two, that end at a line if one ends there, so that a huge file is
    not encoded at once."""
    at = 0
    while at < len(text):
        end = text.find("\n", at + _CHUNK, at + 2 * _CHUNK) + 1 or at + 2 * _CHUNK
        yield text[at:end]
        at = end


def division_hash(files: Sequence[TextFile]) -> str:
    """16 hexadecimal digits of everything that ``divide`` depends on."""
    lines = sorted(f"{file.split} {file.digest}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
