"""The executors' benchmark, with a formula in place of a supernet."""

from __future__ import annotations

import pytest

bench = pytest.importorskip("experiments.executors.run", exc_type=ImportError)


def test_a_search_with_a_formula_is_timed_from_end_to_end():
    figures = bench.timed(bench.LocalExecutor(bench.formula), 12)
    assert figures["lanes"] == 1
    assert figures["engine_ms_per_evaluation"] > figures["evaluation_ms"] >= 0


def test_the_cost_of_a_trial_is_told_at_several_lengths():
    found = bench.measure_length(100)
    assert found["trials"] == 100
    assert set(found["ms_per_trial_at"]) == {"random", "evolution"}
    assert all(value > 0 for values in found["ms_per_trial_at"].values() for value in values.values())


def test_bare_evaluations_use_the_judge_of_the_lanes():
    judge = bench.random_judge()
    assert judge(bench.SPACE.smallest) == judge(bench.SPACE.smallest)
    assert judge(bench.SPACE.smallest).tokens == bench.WINDOWS * bench.LENGTH
