"""What all tasks on a text share: its place, and the windows that an encoder reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moesaic.nas.data import Corpus, open_corpus
from moesaic.nas.data.tokenizer import read_tokenizer
from moesaic.nas.tasks.corpus import CorpusTask
from moesaic.nas.tasks.task import Split
from moesaic.search_spaces import MoesaicError
from moesaic.supernet import Transformer


@dataclass(frozen=True)
class TextTask(CorpusTask):
    """A task on a text; ``name`` is its key among the tasks."""

    corpus: Corpus

    name: ClassVar[str]
    source_vocab_size = None
    source_tokenizer = None
    generation_metrics = ()

    @cached_property
    def frame(self) -> Frame:
        """Raises MoesaicError where the tokenizer is not that of an encoder."""
        return Frame.of(read_tokenizer(self.tokenizer), str(self.tokenizer))

    def framed(self, windows: Tensor) -> Tensor:
        """[B, S] sequences for an encoder, from the first tokens of ``windows`` [B, S + 1]."""
        return self.frame.around(windows[:, :-3])

    def score_generation(self, model: Transformer, split: Split, count: int) -> tuple[dict[str, float], str]:
        return {}, ""

    def plain(self) -> dict[str, Any]:
        folder = str(self.corpus.tokenizer_path.parent.absolute())
        length, size = self.sequence_length, self.vocab_size
        return {"task": self.name, "corpus": folder, "sequence_length": length, "vocab_size": size}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        return cls(corpus_of(plain))


def corpus_of(plain: Mapping[str, Any]) -> Corpus:
    """The corpus that ``TextTask.plain`` described. Raises MoesaicError where it is gone."""
    folder = Path(plain["corpus"])
    return open_corpus(folder, plain["sequence_length"], str(folder), plain["vocab_size"])


@dataclass(frozen=True)
class Frame:
    """The ids of the tokens that an encoder reads around a text, and those of all special tokens."""

    start: int
    end: int
    special: frozenset[int]

    @staticmethod
    def of(tokenizer: Tokenizer, where: str) -> Frame:
        """Raises MoesaicError where the tokenizer, which is in ``where``, has no such tokens."""
        added = tokenizer.get_added_tokens_decoder()
        start, end = (special_id(tokenizer, names, where) for names in (("[CLS]", "<s>"), ("[SEP]", "</s>")))
        return Frame(start, end, frozenset(number for number, token in added.items() if token.special) | {start, end})

    def around(self, windows: Tensor) -> Tensor:
        """[B, n + 2] of ``windows`` [B, n]."""
        start, end = (windows.new_full((len(windows), 1), number) for number in (self.start, self.end))
        return torch.cat([start, windows, end], dim=1)


def special_id(tokenizer: Tokenizer, names: tuple[str, ...], where: str) -> int:
    """The id of the first of ``names`` that there is. Raises MoesaicError where there is none."""
    ids = (tokenizer.token_to_id(name) for name in names)
    found = next((number for number in ids if number is not None), None)
    if found is None:
        raise MoesaicError(
            f"the tokenizer has no {names[0]}, which an encoder reads",
            where=where,
            allowed=f"the tokenizer that the encoder was trained with, which has {' or '.join(names)}",
        )
    return found
