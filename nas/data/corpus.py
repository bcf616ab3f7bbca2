"""A corpus as token streams: a byte-level BPE and memory-mapped arrays, built once and cached by content."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moesaic.nas.config import DataConfig
from moesaic.nas.data.files import SPLITS, TextFile, chunks, content_hash, find_files, split_texts
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.files import read_json, unwritable, write_json

_FORMAT = "1"
"""Part of the cache key: raise it when splitting or encoding changes."""
_BPE_CHARACTERS = 64 << 20
"""The tokenizer is trained on at most this much text; more takes hours and hardly changes the merges."""
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Split:
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
    splits: dict[str, Split]

    def batch(self, split: str, batch_size: int, seed: int, step: int) -> torch.Tensor:
        """[batch_size, S + 1] random windows, a pure function of seed and step."""
        stream, length = self.splits[split], self.sequence_length + 1
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(0, len(stream.tokens) - length + 1, batch_size)
        return torch.from_numpy(np.stack([stream.window(start, length) for start in starts]))

    def windows(self, split: str, count: int) -> torch.Tensor:
        """[n, S + 1] with n <= count: fixed windows that do not overlap, spread evenly over the split."""
        stream, length = self.splits[split], self.sequence_length + 1
        count = min(count, len(stream.tokens) // length)
        starts = np.linspace(0, len(stream.tokens) - length, count).astype(int)
        return torch.from_numpy(np.stack([stream.window(start, length) for start in starts]))

    def bits_per_byte(self, split: str, loss: float) -> float:
        """``loss`` in nats per token as bits per byte of text, which is comparable across tokenizers."""
        stream = self.splits[split]
        return loss / math.log(2) * len(stream.tokens) / stream.text_bytes


def cache_directory() -> Path:
    """``$MOESAIC_CACHE``, or ``moesaic`` in the user's cache directory."""
    if directory := os.environ.get("MOESAIC_CACHE"):
        return Path(directory)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesaic"


def load_corpus(
    config: DataConfig,
    where: str,
    on_stage: Callable[[str], None] = lambda text: None,
    tokenizer: Path | None = None,
) -> Corpus:
    """The corpus of ``config``, from the cache if this text was tokenised before.

    ``tokenizer`` is a ``tokenizer.json`` to use instead of training one on this text.

    Raises
    ------
    MoesaicError : missing, empty or binary files; too little text for the context; an unwritable cache.
    """
    on_stage("reading files")
    files = find_files(config, where)
    vocabulary = str(config.vocab_size)
    if tokenizer is not None:
        vocabulary = hashlib.sha256(tokenizer.read_bytes()).hexdigest()[:16]
    fingerprint = f"{content_hash(files)}-{vocabulary}-{_FORMAT}"
    directory = cache_directory() / "corpora" / fingerprint
    if not (directory / "corpus.json").exists():
        _build(config, files, directory, where, on_stage, tokenizer)
    return open_corpus(directory, config.sequence_length, where)


def open_corpus(directory: Path, sequence_length: int, where: str) -> Corpus:
    """The corpus in a cache folder (its ``tokenizer_path.parent``).

    Raises
    ------
    MoesaicError : the folder is missing or damaged; a split is shorter than the context.
    """
    facts = read_json(directory / "corpus.json")
    splits = {}
    for name in SPLITS:
        path = directory / f"{name}.tokens"
        if path.stat().st_size < 2 * facts["splits"][name]["tokens"]:
            raise MoesaicError("is damaged", where=str(path), allowed="delete this folder; it will be rebuilt")
        tokens = np.memmap(path, dtype=facts["dtype"], mode="r")
        splits[name] = Split(tokens, facts["splits"][name]["bytes"])
        if len(tokens) < sequence_length + 1:
            raise MoesaicError(
                f"the {name} split is shorter than the context",
                where=where,
                found=f"{len(tokens)} tokens",
                allowed=f"at least sequence_length + 1 = {sequence_length + 1}",
                nearest=f"data.sequence_length={max(8, len(tokens) - 1)}" if len(tokens) > 8 else None,
            )
    return Corpus(directory.name, directory / "tokenizer.json", facts["vocab_size"], sequence_length, splits)


def _build(
    config: DataConfig,
    files: list[TextFile],
    directory: Path,
    where: str,
    on_stage: Callable[[str], None],
    given: Path | None,
) -> None:
    """Train or copy the tokenizer and encode all splits, in a temporary folder renamed at the end."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        on_stage("training the tokenizer" if given is None else "reading the tokenizer")
        tokenizer = _train_tokenizer(config, files, where) if given is None else Tokenizer.from_file(str(given))
        tokenizer.save(str(temporary / "tokenizer.json"))
        vocab_size = tokenizer.get_vocab_size()
        dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        facts = {"vocab_size": vocab_size, "dtype": dtype, "splits": {}}
        for split in SPLITS:
            on_stage(f"encoding the {split} split")
            facts["splits"][split] = _encode(tokenizer, split_texts(files, split), temporary / f"{split}.tokens", dtype)
        if empty := [split for split in SPLITS if facts["splits"][split]["tokens"] == 0]:
            raise MoesaicError(
                f"too little text: the {empty[0]} split is empty",
                where=where,
                allowed="more text, at least a few contexts for each of train, validation and test",
            )
        write_json(temporary / "corpus.json", facts)
        if not directory.exists():
            os.rename(temporary, directory)
    except OSError as error:
        raise unwritable(directory, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _train_tokenizer(config: DataConfig, files: list[TextFile], where: str) -> Tokenizer:
    """A byte-level BPE (arXiv 1508.07909) of the training split."""
    tokenizer = Tokenizer(models.BPE())
    # The library's type stubs give these properties no setter; its documentation sets them.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = _limited(chain.from_iterable(map(chunks, split_texts(files, "train"))))
    first = next(texts, None)
    if first is None:
        raise MoesaicError("the corpus is empty: its files hold no text", where=where)
    tokenizer.train_from_iterator(chain([first], texts), trainer)
    return tokenizer


def _limited(texts: Iterator[str]) -> Iterator[str]:
    left = _BPE_CHARACTERS
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text


def _encode(tokenizer: Tokenizer, texts: Iterator[str], path: Path, dtype: str) -> dict[str, int]:
    """Append each text and an end-of-text token to ``path``, in pieces, so that a corpus may exceed memory."""
    tokens = text_bytes = 0
    with open(path, "wb") as file:
        for text in texts:
            pieces = list(chunks(text))
            for index, encoding in enumerate(tokenizer.encode_batch(pieces)):
                ids = encoding.ids + ([0] if index == len(pieces) - 1 else [])
                file.write(np.asarray(ids, dtype=dtype).tobytes())
                tokens += len(ids)
            text_bytes += len(text.encode())
    return {"tokens": tokens, "bytes": text_bytes}
