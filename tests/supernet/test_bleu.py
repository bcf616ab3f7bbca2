"""The BLEU of a slice: sacrebleu's own figure, a value for each sentence, the same judge in another process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU as Scorer

from moesaic.supernet import Batch, Judge, beam_search, evaluate
from moesaic.supernet.bleu import pseudovalues
from tests.supernet.test_encoder_decoder import SPACES, SUPERNETS

END = 1


def words(sentences: list[list[int]]) -> list[str]:
    return [" ".join(map(str, ids)) for ids in sentences]


def corpus_bleu(found: list[list[int]], references: list[list[int]]) -> float:
    return Scorer(tokenize="none").corpus_score(words(found), [words(references)]).score / 100


def noisy(seed: int, size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Sentences, and the same with a fifth of their words replaced and some of their ends lost."""
    rng = np.random.default_rng(seed)
    references = [rng.integers(2, 20, rng.integers(1, 15)).tolist() for _ in range(size)]
    found = [
        [word if rng.random() < 0.8 else int(rng.integers(2, 20)) for word in ids][: len(ids) - int(rng.integers(0, 2))]
        for ids in references
    ]
    return found, references


@given(seed=st.integers(0, 10**6), size=st.integers(2, 12))
def test_a_pseudovalue_is_what_a_sentence_adds(seed: int, size: int) -> None:
    found, references = noisy(seed, size)
    values = pseudovalues(found, references)
    whole = corpus_bleu(found, references)
    for index, value in enumerate(values):
        others = corpus_bleu(found[:index] + found[index + 1 :], references[:index] + references[index + 1 :])
        assert value == pytest.approx(size * whole - (size - 1) * others)


def test_their_mean_is_bleu_and_their_spread_its_error() -> None:
    found, references = noisy(0, 300)
    values = pseudovalues(found, references)
    assert values.mean() == pytest.approx(corpus_bleu(found, references), abs=2e-3)
    rng = np.random.default_rng(1)
    drawn = [rng.integers(0, 300, 300) for _ in range(60)]
    spread = np.std([corpus_bleu([found[i] for i in rows], [references[i] for i in rows]) for rows in drawn])
    assert values.std() / 300**0.5 == pytest.approx(spread, rel=0.35)


def pairs(seed: int, rows: int) -> Batch:
    """Sentences as a task gives them: the end also begins a sentence."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 6, (rows, 1), generator=generator)
    mask = torch.arange(6) < lengths
    targets = torch.randint(2, 30, (rows, 6), generator=generator).scatter(1, lengths - 1, END)
    tokens = torch.cat([torch.full((rows, 1), END), targets[:, :-1]], dim=1)
    return Batch(tokens, targets, mask, source=targets.flip(1), source_mask=mask.flip(1))


def test_a_judge_by_bleu_translates_and_can_be_rebuilt() -> None:
    model, batch = SUPERNETS["two", None], pairs(0, 9)
    assert batch.source is not None
    judge = Judge(model, batch, loss="bleu")
    for architecture in (SPACES["two"].largest, SPACES["two"].smallest):
        judged = judge(architecture)
        found = beam_search(model, batch.source, batch.source_mask, start=END, end=END, architecture=architecture)
        counts = batch.counts().tolist()
        references = [row[: count - 1].tolist() for row, count in zip(batch.targets, counts, strict=True)]
        assert judged.sequence_losses == pytest.approx((1 - pseudovalues(found, references)).tolist())
        assert judged.loss == pytest.approx(np.mean(judged.sequence_losses))
        assert judged.loads == evaluate(model, batch, architecture).loads
        assert judged.tokens == int(batch.mask.sum())
        assert Judge.of(*judge.plain(), torch.device("cpu"))(architecture) == judged
