"""Parallel text: sentences and their translations, read, divided and encoded once, then cached by content."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from moesaic.nas.config import DataConfig
from moesaic.nas.data.cache import cache_directory
from moesaic.nas.data.file_search import shown
from moesaic.nas.data.files import SPLITS, Split
from moesaic.nas.data.pair_files import SIDES, Divided, PairFiles, Side, find_pairs
from moesaic.nas.data.streams import (
    TOKENIZER,
    Checksum,
    cached,
    checked,
    checksums,
    id_type,
    write_facts,
)
from moesaic.nas.data.tokenizer import (
    Vocabulary,
    check_vocabulary,
    end_of_text,
    read_tokenizer,
    tokenizer_file,
    train_tokenizer,
    vocab_size,
)
from moesaic.search_spaces import MoesaicError

_FORMAT = "1"
"""Part of the cache key: raise it when dividing or encoding changes."""
SOURCE_TOKENIZER = "source_tokenizer.json"
"""The tokenizer of the source's language, where it has its own."""
_AT_ONCE = 1 << 14
"""Pairs that are encoded at once."""


@dataclass(frozen=True)
class Sentences:
    """Ids [N] of n sentences, each with its end token, one after the other; and where they start and the last one ends
    [n + 1]."""

    ids: np.ndarray
    offsets: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        """[n] tokens, with the end token."""
        return np.diff(self.offsets)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.ids[self.offsets[number] : self.offsets[number + 1]].astype(np.int64)


@dataclass(frozen=True)
class Pairs:
    """A split: sentence n of ``source`` is translated by sentence n of ``target``. ``kept`` [m] are the numbers of the
    pairs without an over-long side, in the order of the files."""

    source: Sentences
    target: Sentences
    kept: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        """[m] tokens of the longer side of each pair that is kept."""
        return np.maximum(self.source.lengths, self.target.lengths)[self.kept]


@dataclass(frozen=True)
class _Facts:
    """``corpus.json``: what is in the folder. ``end`` and ``source_end`` are the ids of the tokens that end a sentence;
    ``source_vocab_size`` is None where both languages share the vocabulary."""

    vocab_size: int
    source_vocab_size: int | None
    end: int
    source_end: int
    pairs: dict[str, int]
    left_out: dict[str, int]
    files: dict[str, Checksum]


@dataclass(frozen=True)
class ParallelCorpus:
    """Splits of encoded pairs in ``folder``. ``fingerprint`` identifies text, split and tokenizers."""

    folder: Path
    vocab_size: int
    source_vocab_size: int | None
    end: int
    source_end: int
    sequence_length: int
    splits: dict[str, Pairs]

    @property
    def fingerprint(self) -> str:
        return self.folder.name

    @property
    def tokenizer_path(self) -> Path:
        """``tokenizer.json`` of the target."""
        return self.folder / TOKENIZER

    def references(self, split: Split) -> list[str]:
        """The target sentences of a held-out split as they are in the file, one for each pair."""
        return _references(self.folder, split).read_bytes().decode().split("\n")


def load_parallel(
    config: DataConfig,
    where: str,
    say: Callable[[str], None] = lambda text: None,
    vocabulary: Vocabulary | None = None,
) -> ParallelCorpus:
    """The corpus of ``config``, from the cache if these files were encoded before and are intact there.

    ``vocabulary`` is that of a model to go on with, instead of ``config.tokenizer``, or of training one on this text.

    Raises
    ------
    MoesaicError : a file is missing, damaged or not UTF-8; files do not correspond; a split has too few pairs, or that
        for testing an empty sentence; a tokenizer is none, ends no sentence, or has ids that the model has not.
    """
    say("reading files")
    files = find_pairs(config, where)
    given = _given(config, vocabulary)
    mark = f"{config.vocabulary}-{config.vocab_size}"
    if given:
        texts = "".join(read_tokenizer(path).to_str() for path in given.values())
        mark = f"{len(given)}-{hashlib.sha256(texts.encode()).hexdigest()[:16]}"
    contents = "\n".join(f"{split} {' '.join(found.digests)}" for split, found in files.items())
    key = hashlib.sha256(contents.encode()).hexdigest()[:16]
    directory = cache_directory() / "corpora" / f"pairs-{key}-{mark}-{_FORMAT}"
    facts = cached(directory, _Facts, lambda folder: _build(config, files, given, folder, where, say), say)
    corpus = _opened(directory, facts, config.sequence_length, where)
    say(_summary(corpus, facts))
    return corpus if vocabulary is None else _of_model(corpus, vocabulary)


def open_parallel(
    folder: Path, sequence_length: int, where: str, vocabulary: tuple[int, int | None] | None = None
) -> ParallelCorpus:
    """The corpus in a cache folder, for a model with ``vocabulary`` ids of the target and of the source.

    Raises
    ------
    MoesaicError : a file is missing, cut or changed; a split has too few pairs.
    """
    corpus = _opened(folder, checked(folder, _Facts), sequence_length, where)
    if vocabulary is None:
        return corpus
    return replace(corpus, vocab_size=vocabulary[0], source_vocab_size=vocabulary[1])


def sentence_ids(tokenizer: Tokenizer, texts: list[str], end: int) -> list[list[int]]:
    """The ids of each text and ``end``. What reads like a special token in it is text."""
    tokenizer.encode_special_tokens = True
    return [[*encoding.ids, end] for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def sentence_end(tokenizer: Tokenizer, where: str) -> int:
    """The id of the token that ends a sentence. Raises MoesaicError where the tokenizer of ``where`` has none."""
    end = end_of_text(tokenizer)
    if end is None:
        raise MoesaicError(
            "the tokenizer has no token that ends a sentence",
            where=where,
            allowed="<|endoftext|>, </s>, <eos> or [SEP]",
        )
    return end


def _given(config: DataConfig, vocabulary: Vocabulary | None) -> dict[str, Path]:
    """The tokenizers not to be trained, by the name of their file in the cache."""
    if vocabulary is not None:
        source = vocabulary.source_tokenizer
        return {TOKENIZER: vocabulary.tokenizer} | ({} if source is None else {SOURCE_TOKENIZER: source})
    return {} if config.tokenizer is None else {TOKENIZER: tokenizer_file(config.tokenizer)}


def _of_model(corpus: ParallelCorpus, vocabulary: Vocabulary) -> ParallelCorpus:
    check_vocabulary(corpus.vocab_size, vocabulary.size, str(vocabulary.tokenizer))
    if vocabulary.source_size is not None and corpus.source_vocab_size is not None:
        check_vocabulary(corpus.source_vocab_size, vocabulary.source_size, str(vocabulary.source_tokenizer))
    return replace(corpus, vocab_size=vocabulary.size, source_vocab_size=vocabulary.source_size)


def _build(
    config: DataConfig,
    files: Mapping[Split, PairFiles],
    given: Mapping[str, Path],
    folder: Path,
    where: str,
    say: Callable[[str], None],
) -> None:
    """Train or read the tokenizers, and encode all splits."""
    divided = Divided.of(files)
    say("reading the tokenizer" if given else "training the tokenizer")
    if given:
        tokenizers = {name: read_tokenizer(path) for name, path in given.items()}
    elif config.vocabulary == "shared":
        tokenizers = {TOKENIZER: train_tokenizer(chain.from_iterable(divided.pairs("train")), config.vocab_size)}
    else:
        tokenizers = {
            name: train_tokenizer((pair[side] for pair in divided.pairs("train")), config.vocab_size)
            for side, name in enumerate((SOURCE_TOKENIZER, TOKENIZER))
        }
    for name, tokenizer in tokenizers.items():
        (folder / name).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    of_target = tokenizers[TOKENIZER]
    of_source = tokenizers.get(SOURCE_TOKENIZER, of_target)
    ends = [sentence_end(tokenizer, where) for tokenizer in (of_source, of_target)]
    pairs, left_out = {}, Counter[str]()
    for split in SPLITS:
        say(f"encoding the {split} split")
        pairs[split] = _encode(folder, split, divided.pairs(split, left_out), (of_source, of_target), ends)
    for split in files.values():
        for path, digest in zip(split.paths, split.digests, strict=True):
            if Checksum.of(path).sha256 != digest:
                raise MoesaicError(
                    "was changed while the corpus was read", where=shown(path), allowed="a file that stays as it is"
                )
    source_size = vocab_size(of_source) if SOURCE_TOKENIZER in tokenizers else None
    written = checksums(sorted(folder.iterdir()))
    facts = _Facts(vocab_size(of_target), source_size, ends[1], ends[0], pairs, dict(+left_out), written)
    write_facts(folder, facts)


def _encode(
    folder: Path,
    split: Split,
    pairs: Iterator[tuple[str, str]],
    tokenizers: tuple[Tokenizer, Tokenizer],
    ends: list[int],
) -> int:
    """Write ids and offsets of both sides, and the references of a held-out split; returns the number of pairs."""
    offsets: dict[Side, list[int]] = {side: [0] for side in SIDES}
    references: list[str] = []
    with open(_ids(folder, split, "source"), "wb") as source, open(_ids(folder, split, "target"), "wb") as target:
        while some := list(islice(pairs, _AT_ONCE)):
            for side, file, texts, tokenizer, end in zip(
                SIDES, (source, target), zip(*some, strict=True), tokenizers, ends, strict=True
            ):
                dtype = id_type(vocab_size(tokenizer))
                for ids in sentence_ids(tokenizer, list(texts), end):
                    file.write(np.asarray(ids, dtype=dtype).tobytes())
                    offsets[side].append(offsets[side][-1] + len(ids))
            if split != "train":
                references += [reference for _, reference in some]
    for side in SIDES:
        np.asarray(offsets[side], dtype=np.int64).tofile(_offsets(folder, split, side))
    if split != "train":
        _references(folder, split).write_bytes("\n".join(references).encode())
    return len(offsets["source"]) - 1


def _ids(folder: Path, split: str, side: Side) -> Path:
    return folder / f"{split}.{side}.tokens"


def _offsets(folder: Path, split: str, side: Side) -> Path:
    return folder / f"{split}.{side}.offsets"


def _references(folder: Path, split: str) -> Path:
    return folder / f"{split}.references.txt"


def _opened(folder: Path, facts: _Facts, sequence_length: int, where: str) -> ParallelCorpus:
    splits = {}
    sizes = {"source": facts.source_vocab_size or facts.vocab_size, "target": facts.vocab_size}
    for split, count in facts.pairs.items():
        source, target = (_sentences(folder, split, side, id_type(sizes[side])) for side in SIDES)
        kept = np.flatnonzero(np.maximum(source.lengths, target.lengths) <= sequence_length)
        if len(kept) < 2:
            raise MoesaicError(
                f"the {split} split has too few pairs",
                where=where,
                found=f"{count}, of which {len(kept)} have at most sequence_length = {sequence_length} tokens a side",
                allowed="at least 2",
            )
        splits[split] = Pairs(source, target, kept)
    return ParallelCorpus(
        folder,
        facts.vocab_size,
        facts.source_vocab_size,
        facts.end,
        facts.source_end,
        sequence_length,
        splits,
    )


def _sentences(folder: Path, split: str, side: Side, dtype: str) -> Sentences:
    offsets = np.fromfile(_offsets(folder, split, side), dtype=np.int64)
    if len(offsets) == 1:  # an empty file cannot be mapped
        return Sentences(np.zeros(0, dtype), offsets)
    return Sentences(np.memmap(_ids(folder, split, side), dtype=dtype, mode="r"), offsets)


def _summary(corpus: ParallelCorpus, facts: _Facts) -> str:
    """The pairs of each split, and how many were left out for which reason."""
    long = {split: facts.pairs[split] - len(pairs.kept) for split, pairs in corpus.splits.items()}
    reasons = [f"{count} {reason}" for reason, count in facts.left_out.items()]
    if any(long.values()):
        of_each = ", ".join(f"{count} {split}" for split, count in long.items() if count)
        reasons.append(f"{sum(long.values())} longer than sequence_length = {corpus.sequence_length} ({of_each})")
    counts = ", ".join(f"{len(pairs.kept)} {split}" for split, pairs in corpus.splits.items())
    return f"pairs: {counts}" + (f"; left out: {', '.join(reasons)}" if reasons else "")
