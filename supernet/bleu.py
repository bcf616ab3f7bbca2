"""BLEU of what a slice translates, as a loss: 1 - BLEU, with a value for each sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from moesaic.search_spaces import Architecture
from moesaic.supernet.batch import Batch
from moesaic.supernet.evaluate import Evaluation, evaluate
from moesaic.supernet.generate import beam_search
from moesaic.supernet.model import Transformer

BLEU = "bleu"
_ROWS = 32


@torch.inference_mode()
def evaluate_bleu(model: Transformer, batch: Batch, architecture: Architecture) -> Evaluation:
    """1 - BLEU (arXiv 1804.08771, by sacrebleu) of the translations of the sources of ``batch``, whose tokens take the
    place of words; loads are those of the references.

    BLEU is one figure of a whole text. ``sequence_losses`` are its pseudovalues (Tukey's jackknife): their mean is
    ``loss``, and BLEU up to terms of 1 / n^2; their spread gives its standard error.
    """
    read = evaluate(model, batch, architecture)
    targets, counts = batch.targets.cpu(), batch.counts().tolist()
    references = [row[: count - 1].tolist() for row, count in zip(targets, counts, strict=True)]
    start, end = int(batch.tokens[0, 0]), int(targets[0, counts[0] - 1])
    found: list[list[int]] = []
    for first in range(0, len(batch), _ROWS):
        part = batch[first : first + _ROWS].trimmed().to(model.device)
        assert part.source is not None
        found += beam_search(model, part.source, part.source_mask, start=start, end=end, architecture=architecture)
    losses = 1 - pseudovalues(found, references)
    error = float(losses.std(ddof=1) / len(losses) ** 0.5) if len(losses) > 1 else float("inf")
    return replace(read, loss=float(losses.mean()), standard_error=error, sequence_losses=tuple(losses.tolist()))


def pseudovalues(found: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> np.ndarray:
    """[n] n times BLEU (0 to 1) of all sentences, less n - 1 times that of all but one."""
    from sacrebleu.metrics.bleu import BLEU as Scorer  # imported here: few searches ask for it

    scorer = Scorer(tokenize="none")
    rows = []
    for mine, theirs in zip(found, references, strict=True):
        score = scorer.corpus_score([_words(mine)], [[_words(theirs)]])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    statistics = np.array(rows, dtype=int)
    whole, size = statistics.sum(0), len(statistics)

    def bleu(row: np.ndarray) -> float:
        correct, total = row[:4].tolist(), row[4:8].tolist()
        return Scorer.compute_bleu(correct, total, int(row[8]), int(row[9]), smooth_method="exp").score / 100

    if size == 1:
        return np.array([bleu(whole)])
    return np.array([size * bleu(whole) - (size - 1) * bleu(whole - row) for row in statistics])


def _words(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))
