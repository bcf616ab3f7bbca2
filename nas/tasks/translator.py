"""Translates sentences with a model: text to ids, beam search in batches of like length, ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from moesaic.nas.data.parallel import sentence_ids
from moesaic.supernet import Transformer
from moesaic.supernet.batch import padded
from moesaic.supernet.generate import beam_search


@dataclass(frozen=True)
class Decoding:
    """Beam search, ``batch_size`` sentences at a time. ``length_penalty`` is the power of a hypothesis' length that its
    log-probability is divided by. The defaults are those of arXiv 2005.14187."""

    beam: int = 4
    length_penalty: float = 0.6
    batch_size: int = 32

    @property
    def signature(self) -> str:
        return f"beam {self.beam}, length penalty {self.length_penalty:g}"


@dataclass(frozen=True)
class Translator:
    """``end`` and ``source_end`` are the ids of the tokens that end a sentence in either language; ``end`` starts one
    too."""

    model: Transformer
    source: Tokenizer
    target: Tokenizer
    source_end: int
    end: int
    decoding: Decoding = Decoding()

    def encoded(self, texts: list[str]) -> list[list[int]]:
        """The ids that the model reads of each text."""
        return sentence_ids(self.source, texts, self.source_end)

    def translated(self, sources: Sequence[Sequence[int]]) -> list[str]:
        """The translation of each sentence of ids, in their order."""
        texts = [""] * len(sources)
        order = sorted(range(len(sources)), key=lambda number: len(sources[number]))  # little padding
        for first in range(0, len(order), self.decoding.batch_size):
            chosen = order[first : first + self.decoding.batch_size]
            ids, mask = padded([sources[number] for number in chosen], self.source_end)
            device = self.model.device
            found = beam_search(
                self.model,
                ids.to(device),
                mask.to(device),
                start=self.end,
                end=self.end,
                beam=self.decoding.beam,
                length_penalty=self.decoding.length_penalty,
            )
            for number, text in zip(chosen, self.target.decode_batch(found), strict=True):
                texts[number] = text
        return texts
