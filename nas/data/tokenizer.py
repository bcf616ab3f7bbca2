"""The byte-level BPE of a corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from moesaic.nas.data.splits import chunks
from moesaic.search_spaces import MoesaicError

END_OF_TEXT = "<|endoftext|>"
_MOST_CHARACTERS = 64 << 20
"""The tokenizer is trained on at most this much text; more takes hours and hardly changes the merges."""
_LONGEST_WORD = 256
"""Longer words are cut, since the time for a word grows with the square of its length. No usual word is longer."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (arXiv 1508.07909) of ``texts``, with at most ``vocab_size`` tokens, ``END_OF_TEXT`` first."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    short = pre_tokenizers.Split(Regex(f".{{{_LONGEST_WORD}}}"), "isolated")
    # The library's type stubs give these properties no setter; its documentation sets them.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, short])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_limited(chain.from_iterable(map(chunks, texts))), trainer)
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a ``tokenizer.json``. Raises MoesaicError where that is none, or has no ``END_OF_TEXT``."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))  # from_file takes no path in other bytes
    except Exception as error:  # the library raises no narrower one
        raise MoesaicError(f"is not a tokenizer: {error}", where=str(path), allowed="a tokenizer.json") from None
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise MoesaicError(f"the tokenizer has no token {END_OF_TEXT}", where=str(path))
    return tokenizer


def _limited(texts: Iterator[str]) -> Iterator[str]:
    left = _MOST_CHARACTERS
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text
