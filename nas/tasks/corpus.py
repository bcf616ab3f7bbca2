"""What all tasks on an encoded corpus share: its vocabulary, its fingerprint, its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moesaic.search_spaces import MoesaicError


class Encoded(Protocol):
    """A corpus of text, or of pairs of sentences."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def tokenizer_path(self) -> Path: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def sequence_length(self) -> int: ...


@dataclass(frozen=True)
class CorpusTask:
    corpus: Encoded

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    @property
    def vocab_size(self) -> int:
        return self.corpus.vocab_size

    @property
    def sequence_length(self) -> int:
        return self.corpus.sequence_length

    @property
    def tokenizer(self) -> Path:
        return standing(self.corpus.tokenizer_path)


def standing(path: Path) -> Path:
    """``path``, a file of the cache. Raises MoesaicError where it is gone."""
    if not path.is_file():
        problem = "is gone: the cache was cleared while it was in use"
        raise MoesaicError(problem, where=str(path), allowed="the same command again, which rebuilds it")
    return path
