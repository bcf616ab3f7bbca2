"""The byte-level BPE of a corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from moesaic.nas.data.cache import expanded
from moesaic.nas.data.splits import chunks
from moesaic.search_spaces import MoesaicError

END_OF_TEXT = "<|endoftext|>"
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""What other programs call the token that ends a document."""
_MOST_CHARACTERS = 64 << 20
"""The tokenizer is trained on at most this much text; more takes hours and hardly changes the merges."""
_LONGEST_WORD = 256
"""Longer words are cut, since the time for a word grows with the square of its length. No usual word is longer."""


@dataclass(frozen=True)
class Vocabulary:
    """That of a model that there is: its ``tokenizer``, and how many ids it has, some of them perhaps unused; and the
    same for the source's language, where a model that translates has another vocabulary for it."""

    tokenizer: Path
    size: int
    source_tokenizer: Path | None = None
    source_size: int | None = None


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


def tokenizer_file(given: str) -> Path:
    """The ``tokenizer.json`` that a user named, or its folder. Raises MoesaicError where there is none."""
    path = expanded(given, "data.tokenizer")
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise MoesaicError(
            "no tokenizer.json",
            where="data.tokenizer",
            found=str(path),
            allowed="a fast tokenizer: AutoTokenizer.from_pretrained(...).save_pretrained(DIR) writes one",
        )
    return file


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id of the token that ends a document; None where it has none of the known ones."""
    ids = (tokenizer.token_to_id(token) for token in _ENDS)
    return next((number for number in ids if number is not None), None)


def vocab_size(tokenizer: Tokenizer) -> int:
    """The number of ids: one more than the largest, since some vocabularies have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def check_vocabulary(size: int, model_size: int, where: str) -> None:
    """Raises MoesaicError where a tokenizer of ``size`` ids, that of ``where``, has ids that the model has not."""
    if size > model_size:
        raise MoesaicError(
            "the tokenizer is of another vocabulary",
            where=where,
            found=f"ids up to {size - 1}",
            allowed=f"ids below the model's {model_size}",
        )


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a ``tokenizer.json``, without the limits on length that it may contain. Raises MoesaicError
    where that is none."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))  # from_file takes no path in other bytes
    except Exception as error:  # the library raises no narrower one
        raise MoesaicError(f"is not a tokenizer: {error}", where=str(path), allowed="a tokenizer.json") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_of(path: Path, model_size: int) -> Tokenizer:
    """``read_tokenizer`` for a model that there is. Raises MoesaicError also where the model lacks some of its ids."""
    tokenizer = read_tokenizer(path)
    check_vocabulary(vocab_size(tokenizer), model_size, str(path))
    return tokenizer


def _limited(texts: Iterator[str]) -> Iterator[str]:
    left = _MOST_CHARACTERS
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text
