"""Translation: predict each token of a sentence from those before it and from the sentence that it translates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from moesaic.nas.data.buckets import Buckets
from moesaic.nas.data.parallel import SOURCE_TOKENIZER, Pairs, ParallelCorpus, open_parallel
from moesaic.nas.data.tokenizer import read_tokenizer
from moesaic.nas.tasks.corpus import CorpusTask, standing
from moesaic.nas.tasks.language import perplexity
from moesaic.nas.tasks.task import Metric, Split
from moesaic.nas.tasks.translator import Translator
from moesaic.supernet import Batch, Transformer
from moesaic.supernet.batch import padded


@dataclass(frozen=True)
class Translation(CorpusTask):
    """The decoder reads a token that starts the sentence and then the sentence; its last target is the token that ends
    it. One token is both, as in fairseq. A training batch has about as many tokens as ``size`` pairs on average."""

    corpus: ParallelCorpus

    name = "translation"
    loss = "cross_entropy"
    unit = "nats per target token"
    imitation = "distillation"
    metrics = (Metric("perplexity", "perplexity", ".2f"),)
    generation_metrics = (
        Metric("bleu", "BLEU", ".2f", higher_is_better=True),
        Metric("chrf", "chrF", ".2f", higher_is_better=True),
    )

    @property
    def source_vocab_size(self) -> int | None:
        return self.corpus.source_vocab_size

    @property
    def source_tokenizer(self) -> Path | None:
        return None if self.source_vocab_size is None else standing(self.corpus.folder / SOURCE_TOKENIZER)

    def batch(self, size: int, seed: int, step: int) -> Batch:
        return self._pairs("train", self._training.kept[self._buckets(size).rows(seed, step)])

    def held_out(self, split: Split, count: int) -> Batch:
        return self._pairs(split, self._held_out(split, count))

    def measure(self, split: Split, loss: float) -> dict[str, float]:
        return {"perplexity": perplexity(loss)}

    def score_generation(self, model: Transformer, split: Split, count: int) -> tuple[dict[str, float], str]:
        """BLEU (arXiv 1804.08771) and chrF of ``model``'s translations of ``held_out(split, count)``, against the
        sentences in the file."""
        # Imported here: only finished models are scored.
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        rows, source = self._held_out(split, count), self.corpus.splits[split].source
        translator = self.translator(model)
        texts = translator.translated([source[row].tolist() for row in rows])
        references = self.corpus.references(split)
        wanted = [[references[row] for row in rows]]
        scorers = {"bleu": BLEU(), "chrf": CHRF()}
        found = {name: scorer.corpus_score(texts, wanted) for name, scorer in scorers.items()}
        signatures = (f"{found[name].name} {scorer.get_signature()}" for name, scorer in scorers.items())
        signature = "; ".join([translator.decoding.signature, *signatures])
        return {name: score.score for name, score in found.items()}, signature

    def translator(self, model: Transformer) -> Translator:
        target = read_tokenizer(self.tokenizer)
        source = target if self.source_tokenizer is None else read_tokenizer(self.source_tokenizer)
        return Translator(model, source, target, self.corpus.source_end, self.corpus.end)

    def plain(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "corpus": str(self.corpus.folder.absolute()),
            "sequence_length": self.sequence_length,
            "vocabulary": [self.vocab_size, self.source_vocab_size],
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        size, source_size = plain["vocabulary"]
        folder = Path(plain["corpus"])
        return cls(open_parallel(folder, plain["sequence_length"], str(folder), (size, source_size)))

    @property
    def _training(self) -> Pairs:
        return self.corpus.splits["train"]

    @cached_property
    def _by_size(self) -> dict[int, Buckets]:
        return {}

    def _buckets(self, size: int) -> Buckets:
        if size not in self._by_size:
            self._by_size[size] = Buckets(self._training.lengths, size)
        return self._by_size[size]

    def _held_out(self, split: Split, count: int) -> np.ndarray:
        """[n] pairs from the shortest to the longest, so that little is padding, evenly spread over the file."""
        pairs = self.corpus.splits[split]
        spread = np.linspace(0, len(pairs.kept) - 1, min(count, len(pairs.kept))).astype(int)
        return pairs.kept[spread[np.argsort(pairs.lengths[spread], kind="stable")]]

    def _pairs(self, split: Split, rows: np.ndarray) -> Batch:
        """The pairs ``rows`` [B], padded at the right."""
        pairs = self.corpus.splits[split]
        source, source_mask = padded([pairs.source[row] for row in rows], self.corpus.source_end)
        targets, mask = padded([pairs.target[row] for row in rows], self.corpus.end)
        start = targets.new_full((len(rows), 1), self.corpus.end)
        tokens = torch.cat([start, targets[:, :-1]], dim=1)
        return Batch(tokens, targets, mask, source=source, source_mask=source_mask)
