"""Translates lines of text with an exported model, as many at a time as it is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from tokenizers import Tokenizer

from moesaic.nas.data.parallel import SOURCE_TOKENIZER, sentence_end
from moesaic.nas.data.streams import TOKENIZER
from moesaic.nas.data.tokenizer import tokenizer_of
from moesaic.nas.exports.folder import load_exported, read_facts
from moesaic.nas.tasks.translator import Decoding, Translator
from moesaic.search_spaces import MoesaicError


def load_translator(directory: Path, decoding: Decoding) -> tuple[Translator, int]:
    """The model and the tokenizers of an export, and how many tokens it reads. Raises MoesaicError where it does not
    translate, or a tokenizer has ids that the model has not."""
    model = load_exported(directory)
    if model.architecture.encoder is None:
        raise MoesaicError(
            "is not a model that translates: it has no encoder",
            where=str(directory),
            allowed="an export of a run with data of kind parallel",
        )
    target, target_end = _tokenizer(directory / TOKENIZER, model.vocab_size)
    source, source_end = target, target_end
    if model.source_vocab_size is not None:
        source, source_end = _tokenizer(directory / SOURCE_TOKENIZER, model.source_vocab_size)
    translator = Translator(model, source, target, source_end, target_end, decoding)
    return translator, read_facts(directory).sequence_length


def utf8_lines(file: BinaryIO, where: str) -> Iterator[str]:
    """The lines of ``file``. Raises MoesaicError at one that is not UTF-8."""
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise MoesaicError(f"is not UTF-8: {error.reason}", where=f"{where}, line {number}") from None


def translate_lines(translator: Translator, longest: int, lines: Iterable[str], where: str = "line") -> Iterator[str]:
    """The translation of each of ``lines``, in their order; that of an empty line is empty.

    They are read and translated ``batch_size`` at a time. Those before a wrong one are translated.

    Raises
    ------
    MoesaicError : a line has more than ``longest`` tokens, which is more than the model was trained on; it is
        named by its number after ``where``.
    """
    waiting: list[list[int]] = []
    try:
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            ids = translator.encoded([text])[0] if text else []
            if len(ids) > longest:
                raise MoesaicError(
                    "the line is too long for the model",
                    where=f"{where} {number}",
                    found=f"{len(ids)} tokens",
                    allowed=f"at most sequence_length = {longest}: one sentence a line",
                )
            waiting.append(ids)
            if len(waiting) == translator.decoding.batch_size:
                yield from _translated(translator, waiting)
                waiting = []
    except MoesaicError:
        yield from _translated(translator, waiting)
        raise
    yield from _translated(translator, waiting)


def _translated(translator: Translator, sources: list[list[int]]) -> Iterator[str]:
    texts = iter(translator.translated([ids for ids in sources if ids]))
    return (" ".join(next(texts).split("\n")) if ids else "" for ids in sources)


def _tokenizer(path: Path, size: int) -> tuple[Tokenizer, int]:
    """With the id that ends a sentence."""
    tokenizer = tokenizer_of(path, size)
    return tokenizer, sentence_end(tokenizer, str(path))
