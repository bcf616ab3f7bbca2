"""A corpus as token streams: found, divided and tokenised once, then cached by content."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from moesaic.nas.config import DataConfig
from moesaic.nas.data.cache import cache_directory
from moesaic.nas.data.files import SPLITS, Split, TextFile, find_files
from moesaic.nas.data.records import has_records
from moesaic.nas.data.splits import Piece, divide, division_hash
from moesaic.nas.data.streams import TOKENIZER, StreamFacts, cached, checked, stream_path, write_streams
from moesaic.nas.data.tokenizer import check_vocabulary, read_tokenizer, tokenizer_file, train_tokenizer
from moesaic.search_spaces import MoesaicError

_FORMAT = "2"
"""Part of the cache key: raise it when splitting or encoding changes."""


@dataclass(frozen=True)
class TokenSplit:
    """A token stream [N] and the number of bytes of text it encodes."""

    tokens: np.ndarray
    text_bytes: int

    def window(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length].astype(np.int64)


@dataclass(frozen=True)
class Corpus:
    """Splits of a tokenised corpus. ``fingerprint`` identifies text, split and tokenizer."""

    fingerprint: str
    tokenizer_path: Path
    vocab_size: int
    sequence_length: int
    splits: dict[str, TokenSplit]

    def batch(self, split: str, batch_size: int, seed: int, step: int) -> torch.Tensor:
        """[batch_size, S + 1] random windows, a pure function of seed and step."""
        stream, length = self.splits[split], self.sequence_length + 1
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(0, len(stream.tokens) - length + 1, batch_size)
        return torch.from_numpy(np.stack([stream.window(start, length) for start in starts]))

    def windows(self, split: str, count: int) -> torch.Tensor:
        """[n, L] with n <= count: fixed windows that do not overlap, spread evenly over the split.

        L is S + 1, or half the split where that is less: an error over windows needs at least two.
        """
        stream = self.splits[split]
        length = min(self.sequence_length + 1, len(stream.tokens) // 2)
        count = min(count, len(stream.tokens) // length)
        starts = np.linspace(0, len(stream.tokens) - length, count).astype(int)
        return torch.from_numpy(np.stack([stream.window(start, length) for start in starts]))

    def bits_per_byte(self, split: str, loss: float) -> float:
        """``loss`` in nats per token as bits per byte of text, which is comparable across tokenizers."""
        stream = self.splits[split]
        return loss / math.log(2) * len(stream.tokens) / stream.text_bytes


def load_corpus(
    config: DataConfig,
    where: str,
    on_stage: Callable[[str], None] = lambda text: None,
    tokenizer: Path | None = None,
    own: Iterable[Path] = (),
    vocab_size: int | None = None,
) -> Corpus:
    """The corpus of ``config``, from the cache if this text was tokenised before and is intact there.

    ``tokenizer`` is a ``tokenizer.json`` to use instead of ``config.tokenizer``, or of training one on this text, and
    ``vocab_size`` that of the model it belongs to, which may have unused ids. Files and folders in ``own`` are those of
    the run, which may be inside a folder of the corpus but no part of it.

    Raises
    ------
    MoesaicError : missing, empty or binary files; too little text for the context; an unwritable cache; a tokenizer
        that is none, or has ids that the model has not.
    """
    if tokenizer is None and config.tokenizer is not None:
        tokenizer = tokenizer_file(config.tokenizer)
    on_stage("reading files")
    found = find_files(config, where, own)
    for note in found.notes:
        on_stage(note)
    vocabulary = str(config.vocab_size)
    if tokenizer is not None:
        vocabulary = hashlib.sha256(read_tokenizer(tokenizer).to_str().encode()).hexdigest()[:16]
    text = division_hash(found.files) + _field_mark(config, found.files)
    directory = cache_directory() / "corpora" / f"{text}-{vocabulary}-{_FORMAT}"
    facts = cached(
        directory,
        StreamFacts,
        lambda folder: _build(config, divide(found.files), folder, where, on_stage, tokenizer),
        on_stage,
    )
    corpus = _opened(directory, facts, config.sequence_length, where)
    if vocab_size is not None:
        check_vocabulary(corpus.vocab_size, vocab_size, str(tokenizer))
        corpus = replace(corpus, vocab_size=vocab_size)
    for split in SPLITS[1:]:
        if len(corpus.splits[split].tokens) < 2 * (config.sequence_length + 1):
            shorter = corpus.windows(split, 2).shape[1] - 1
            on_stage(f"the {split} split is shorter than two contexts: models are compared on two of {shorter} tokens")
    return corpus


def _field_mark(config: DataConfig, files: Iterable[TextFile]) -> str:
    """What the name of a cached corpus says of the field that its texts are from, if any are."""
    if not any(has_records(file.path) for file in files):
        return ""
    return "-" + hashlib.sha256(config.field.encode()).hexdigest()[:8]


def open_corpus(directory: Path, sequence_length: int, where: str, vocab_size: int | None = None) -> Corpus:
    """The corpus in a cache folder (its ``tokenizer_path.parent``), for a model with ``vocab_size`` ids.

    Raises
    ------
    MoesaicError : a file is missing, cut or changed; a split is shorter than the context.
    """
    corpus = _opened(directory, checked(directory, StreamFacts), sequence_length, where)
    return corpus if vocab_size is None else replace(corpus, vocab_size=vocab_size)


def _opened(directory: Path, facts: StreamFacts, sequence_length: int, where: str) -> Corpus:
    splits = {}
    for name, stream in facts.streams.items():
        if stream.tokens < sequence_length + 1:
            raise MoesaicError(
                f"the {name} split is shorter than the context",
                where=where,
                found=f"{stream.tokens} tokens",
                allowed=f"at least sequence_length + 1 = {sequence_length + 1}",
                nearest=f"data.sequence_length={stream.tokens - 1}" if stream.tokens > 8 else None,
            )
        tokens = np.memmap(stream_path(directory, name), dtype=facts.dtype, mode="r")
        splits[name] = TokenSplit(tokens, stream.text_bytes)
    return Corpus(directory.name, directory / TOKENIZER, facts.vocab_size, sequence_length, splits)


def _build(
    config: DataConfig,
    pieces: Mapping[Split, list[Piece]],
    folder: Path,
    where: str,
    on_stage: Callable[[str], None],
    given: Path | None,
) -> None:
    """Train or read the tokenizer, and encode all splits."""
    on_stage("training the tokenizer" if given is None else "reading the tokenizer")
    if given is None:
        tokenizer = train_tokenizer((text for piece in pieces["train"] for text in piece.texts()), config.vocab_size)
    else:
        tokenizer = read_tokenizer(given)

    def texts(split: Split) -> Iterator[str]:
        on_stage(f"encoding the {split} split")
        for piece in pieces[split]:
            yield from piece.texts()

    facts = write_streams(folder, tokenizer, {split: texts(split) for split in SPLITS})
    if empty := [split for split, stream in facts.streams.items() if stream.tokens == 0]:
        raise MoesaicError(
            f"too little text: the {empty[0]} split is empty",
            where=where,
            allowed="more text, at least a few contexts for each of train, validation and test",
        )
