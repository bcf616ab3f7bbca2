"""MoEBERT's split: rows are dealt as published, and a slice has the neurons that it should have."""

from __future__ import annotations

import torch

from experiments.moebert import run as moebert
from moesaic.search_spaces import FeedForward, Slot


def test_the_first_neurons_are_shared_and_the_next_dealt_in_turn() -> None:
    ranked = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    part = FeedForward((16, 16), moebert.ONE, 32)
    rows = moebert.dealt(ranked, part)
    assert sorted(rows.tolist()) == list(range(96))
    rest = ranked[32:]
    assert torch.equal(rows[:64], torch.cat([ranked[:32], rest[0:32:2], rest[1:32:2]]))
    assert torch.equal(moebert.dealt(ranked, FeedForward((48,))), ranked)


def test_layouts_use_as_many_neurons_as_they_say() -> None:
    parts = {name: make(768) for name, make in moebert.LAYOUTS.items()}
    assert [part.worst_active_neurons for part in parts.values()] == [384, 192, 192, 192]
    assert parts["1 of 4 experts, 1/6 shared"].neurons == 384  # as many survive as in MoEBERT
    assert parts["1 of 4 experts, none shared"].neurons == 768


def test_random_orders_differ_by_seed_and_layer() -> None:
    first, second = Slot("decoder", 0), Slot("decoder", 1)
    ranks = dict.fromkeys((first, second), torch.arange(64))
    one, two = moebert.by_chance(ranks, 0), moebert.by_chance(ranks, 1)
    assert not torch.equal(one[first], two[first])
    assert not torch.equal(one[first], one[second])
    assert torch.equal(one[first].sort().values, torch.arange(64))
    assert torch.equal(moebert.by_chance(ranks, 0)[first], one[first])
