"""The search bench: shares of a known hypervolume, searches replayed from the committed tables, and its rivals."""

import json
import sys
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.common import read_rows
from experiments.search_bench import curves, large, methods, run, scale, table
from moesaic import Context, MoesaicError, open_run, read_value


@pytest.fixture(scope="module")
def moe():
    return table.read_table("moe")


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=12))
def test_shares_grow_to_one_and_count_unit_squares(pairs):
    """Against counting the unit squares that a set of points with whole coordinates dominates."""
    points = [np.array(pair, float) for pair in pairs]
    truth = curves.Truth(np.array(points), np.array([10.0, 10.0]), 1.0)
    found = curves.shares(points, truth)
    for n in range(1, len(pairs) + 1):
        squares = {(x, y) for x in range(1, 10) for y in range(1, 10) if any(x >= a and y >= b for a, b in pairs[:n])}
        assert found[n - 1] == pytest.approx(len(squares))
    assert (np.diff(found) >= 0).all()


def test_what_is_outside_the_budget_adds_nothing_and_counts():
    truth = curves.Truth(np.array([[1.0, 1.0]]), np.array([3.0, 3.0]), 4.0)
    found = curves.shares([None, np.array([2.0, 2.0]), None, np.array([1.0, 1.0])], truth)
    assert found.tolist() == [0, 0.25, 0.25, 1]
    assert curves.needed(found, 0.25) == 2
    assert curves.needed(found, 0.99) == 4
    assert curves.needed(found[:3], 0.99) == float("inf")


@pytest.mark.parametrize("name", ["moe", "heads"])
def test_committed_tables_are_whole_and_hold_thousands(name):
    found = table.read_table(name)
    assert len(found.evaluations) == found.space.cardinality >= 5000
    losses = np.array([evaluation.loss for evaluation in found.evaluations.values()])
    assert np.isfinite(losses).all()
    assert losses.std() > 0.01
    for architecture in Random(0).sample(list(found.evaluations), 50):
        loads = found(architecture).loads
        for layer, load in zip(architecture.layers.values(), loads, strict=True):
            router = layer.feed_forward.router
            assert (load is None) == (router is None)
            assert load is None or 0.99 <= sum(load.pairs_per_token) <= router.max_experts + 1e-3


def test_a_table_of_another_space_is_refused(monkeypatch, tmp_path):
    for ending in (".yaml", ".csv.gz", ".json"):
        (tmp_path / f"moe{ending}").write_bytes((table.HERE / f"moe{ending}").read_bytes())
    text = (tmp_path / "moe.yaml").read_text().replace("width: [64, 96]", "width: [64, 80]")
    (tmp_path / "moe.yaml").write_text(text)
    monkeypatch.setattr(table, "HERE", tmp_path)
    with pytest.raises(MoesaicError, match="another space"):
        table.read_table("moe")


def test_every_method_gives_as_many_evaluations_as_asked_and_ours_stay_inside(moe):
    for name, method in methods.METHODS.items():
        asked = method(moe.space, moe.budget, moe, 0, 30)
        assert len(asked) == 30, name
        assert all(architecture in moe.space for architecture in asked)
        if "plain" not in name:
            assert all(map(moe.budget.fits, asked)), name
            assert len(set(asked)) == 30, name


def test_the_published_evolution_ends_better_than_it_starts(moe):
    asked = methods.automoe(moe.space, moe.budget, moe, 0, 400)
    losses = [moe(architecture).loss for architecture in asked]
    assert len(set(asked)) == 400
    assert np.mean(losses[-100:]) < np.mean(losses[:100]) - 0.02


def test_a_curve_is_kept_as_its_steps(moe):
    truth, method = run.truth_of(moe), "AutoMoE's evolution"
    row = json.loads(json.dumps(run.search(moe, truth, "moe", method, 3)))
    history = run.history_of(row)
    assert len(history) == row["evaluations"] == run.LENGTHS[method]
    asked = methods.METHODS[method](moe.space, moe.budget, moe, 3, 100)
    points = [curves.point(moe.budget, architecture, moe(architecture)) for architecture in asked]
    assert history[:100] == pytest.approx(curves.shares(points, truth), abs=1e-5)


def test_the_committed_result_is_that_of_the_committed_curves():
    result = json.loads((table.HERE / "result.json").read_text())
    again = json.loads(json.dumps(run.summary(read_rows(run.CURVES))))
    assert result["methods"] == again
    assert min(row["seeds"] for row in result["methods"] if row["method"] not in run.DETERMINISTIC) >= 10


SMALL = """
space:
  preset: tiny
  width: [16]
  depth: [1]
  layer:
    heads: [1]
    kv_heads: [1]
    experts: [1, 2]
    expert_sizes: [16]
    dense_sizes: [16, 32]
    routers: [{kind: top_k, k: [1]}]
"""


@pytest.fixture
def small(micro_config, monkeypatch, tmp_path):
    """The folder of a table of a few architectures, as the script makes it."""
    text = micro_config.read_text().replace("space: tiny\n", SMALL)
    (tmp_path / "moe.yaml").write_text(text.replace("budget: {flops: 75%, parameters: 80%}", "budget: {flops: 100%}"))
    monkeypatch.setattr(table, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["table", "moe"])
    table.main()
    return tmp_path


def test_a_table_holds_what_the_model_says(small):
    found, run_of = table.read_table("moe"), open_run(small / "moe.yaml", out=small / "runs" / "moe")
    judge = run_of.judge("validation", run_of.config.search.evaluation_windows)
    assert set(found.evaluations) == set(run_of.space)
    for architecture, evaluation in found.evaluations.items():
        assert evaluation.loss == pytest.approx(judge(architecture).loss, abs=1e-4)
    lines = (small / "runs" / "moe" / "table.csv").read_text()
    (small / "runs" / "moe" / "table.csv").write_text(lines[:-5])  # cut off by a kill
    table.main()
    assert (small / "runs" / "moe" / "table.csv").read_text() == lines


def test_evaluations_of_a_large_space_are_remembered(small, monkeypatch):
    run_of = open_run(small / "moe.yaml", out=small / "runs" / "moe")
    monkeypatch.setattr(large, "WINDOWS", 4)
    first = [large.Remembered(run_of)(architecture) for architecture in run_of.space]
    again = large.Remembered(run_of)
    monkeypatch.setattr(large, "evaluate", None)
    assert [again(architecture) for architecture in run_of.space] == first


def test_the_bench_at_scale_runs_on_a_small_space(tmp_path, monkeypatch):
    (tmp_path / "small.yaml").write_text("{preset: tiny, layer: {expert_sizes: [16, 32], shared_sizes: [0]}}")
    monkeypatch.setattr(scale, "SPACE", tmp_path / "small.yaml")
    monkeypatch.setattr(scale, "CONTEXT", Context(256, 32, 1))
    monkeypatch.setattr(scale, "BUDGETS", {"tight": {"flops": "45%", "parameters": "60%"}})
    monkeypatch.setattr(scale, "PLANNED", 20)
    monkeypatch.setattr(sys, "argv", ["scale", "--members", "2", "--out", str(tmp_path / "scale.json")])
    scale.main()
    result = read_value(tmp_path / "scale.json", dict)
    assert result["count_of_neighbours"] > 0
    assert result["tight"].keys() == {"share_inside", "first_draw_ms", "draw", "repair"}
    assert {"sample", "price", "neighbours", "plan_seconds", "memory_mb", "device", "seed"} <= result.keys()
