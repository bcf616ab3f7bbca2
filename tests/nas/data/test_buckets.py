"""Buckets: every sentence once an epoch, about as many tokens in each batch, rows that workers can divide."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.nas.data.buckets import Buckets

lengths = st.lists(st.integers(1, 60), min_size=2, max_size=300).map(np.array)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 40), st.integers(0, 2**70))
def test_an_epoch_has_every_sentence(found: np.ndarray, size: int, seed: int) -> None:
    buckets, seen = Buckets(found, size), Counter()
    for step in range(len(buckets)):
        rows = buckets.rows(seed, step)
        assert len(rows) % buckets.grain == 0
        assert len(rows) == buckets.grain or len(rows) * found[rows].max() <= buckets.tokens
        seen.update(rows.tolist())
    assert set(seen) == set(range(len(found)))
    most = seen.most_common(1)[0][1]
    assert most == 1 or sum(seen.values()) - len(found) < buckets.grain


def test_batches_have_about_as_many_tokens_and_little_padding() -> None:
    found = np.random.default_rng(0).poisson(14, 5000) + 1
    buckets = Buckets(found, 64)
    rows = [buckets.rows(0, step) for step in range(len(buckets))]
    tokens = np.array([found[row].sum() for row in rows])
    assert 0.9 < tokens.mean() / (64 * found.mean()) <= 1
    assert sum(len(row) * found[row].max() - found[row].sum() for row in rows) < 0.03 * tokens.sum()
    counts = [len(row) for row in rows]
    assert max(counts) > 2 * min(counts)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    found = np.random.default_rng(0).poisson(14, 400) + 1
    buckets, same = Buckets(found, 16), Buckets(found.copy(), 16)
    epochs = [[buckets.rows(seed, first + step).tolist() for step in range(len(buckets))]
              for seed, first in ((0, 0), (0, len(buckets)), (1, 0))]  # fmt: skip
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert {tuple(sorted(row)) for row in epochs[0]} != {tuple(sorted(row)) for row in epochs[1]}
    assert epochs[0] == [same.rows(0, step).tolist() for step in range(len(same))]
