"""The search bench: shares of a known hypervolume, searches replayed from the committed tables, and its rivals."""

import importlib
import json
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.search_spaces import MoesaicError

FOLDER = Path(__file__).parents[2] / "experiments" / "search_bench"


@pytest.fixture(scope="module")
def bench():
    """The scripts, which import their neighbours by name."""
    names = ("curves", "table", "methods", "run", "large")
    other = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    modules = {name: importlib.import_module(name) for name in names}
    yield type("Bench", (), modules)
    sys.path.remove(str(FOLDER))
    for name in names:
        del sys.modules[name]
    sys.modules.update(other)


@pytest.fixture(scope="module")
def moe(bench):
    return bench.table.read_table("moe")


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=12))
def test_shares_grow_to_one_and_count_unit_squares(bench, pairs):
    """Against counting the unit squares that a set of points with whole coordinates dominates."""
    points = [np.array(pair, float) for pair in pairs]
    truth = bench.curves.Truth(np.array(points), np.array([10.0, 10.0]), 1.0)
    found = bench.curves.shares(points, truth)
    for n in range(1, len(pairs) + 1):
        squares = {(x, y) for x in range(1, 10) for y in range(1, 10) if any(x >= a and y >= b for a, b in pairs[:n])}
        assert found[n - 1] == pytest.approx(len(squares))
    assert (np.diff(found) >= 0).all()


def test_what_is_outside_the_budget_adds_nothing_and_counts(bench):
    truth = bench.curves.Truth(np.array([[1.0, 1.0]]), np.array([3.0, 3.0]), 4.0)
    found = bench.curves.shares([None, np.array([2.0, 2.0]), None, np.array([1.0, 1.0])], truth)
    assert found.tolist() == [0, 0.25, 0.25, 1]
    assert bench.curves.needed(found, 0.25) == 2
    assert bench.curves.needed(found, 0.99) == 4
    assert bench.curves.needed(found[:3], 0.99) == float("inf")


@pytest.mark.parametrize("name", ["moe", "heads"])
def test_committed_tables_are_whole_and_hold_thousands(bench, name):
    table = bench.table.read_table(name)
    assert len(table.evaluations) == table.space.cardinality >= 5000
    losses = np.array([evaluation.loss for evaluation in table.evaluations.values()])
    assert np.isfinite(losses).all()
    assert losses.std() > 0.01
    for architecture in Random(0).sample(list(table.evaluations), 50):
        loads = table(architecture).loads
        for layer, load in zip(architecture.decoder.layers, loads, strict=True):
            router = layer.feed_forward.router
            assert (load is None) == (router is None)
            assert load is None or 0.99 <= load.experts_per_token <= router.most + 1e-3


def test_a_table_of_another_space_is_refused(bench, monkeypatch, tmp_path):
    for ending in (".yaml", ".csv.gz", ".json"):
        (tmp_path / f"moe{ending}").write_bytes((FOLDER / f"moe{ending}").read_bytes())
    text = (tmp_path / "moe.yaml").read_text().replace("width: [64, 96]", "width: [64, 80]")
    (tmp_path / "moe.yaml").write_text(text)
    monkeypatch.setattr(bench.table, "HERE", tmp_path)
    with pytest.raises(MoesaicError, match="another space"):
        bench.table.read_table("moe")


def test_every_method_gives_as_many_evaluations_as_asked_and_ours_stay_inside(bench, moe):
    for name, method in bench.methods.METHODS.items():
        asked = method(moe.space, moe.budget, moe, 0, 30)
        assert len(asked) == 30, name
        assert all(architecture in moe.space for architecture in asked)
        if "plain" not in name:
            assert all(map(moe.budget.fits, asked)), name
            assert len(set(asked)) == 30, name


def test_the_published_evolution_ends_better_than_it_starts(bench, moe):
    asked = bench.methods.automoe(moe.space, moe.budget, moe, 0, 400)
    losses = [moe(architecture).loss for architecture in asked]
    assert len(set(asked)) == 400
    assert np.mean(losses[-100:]) < np.mean(losses[:100]) - 0.02


def test_a_curve_is_kept_as_its_steps(bench, moe):
    truth, method = bench.run.truth_of(moe), "AutoMoE's evolution"
    row = json.loads(json.dumps(bench.run.search(moe, truth, "moe", method, 3)))
    history = bench.run.history_of(row)
    assert len(history) == row["evaluations"] == bench.run.LENGTHS[method]
    asked = bench.methods.METHODS[method](moe.space, moe.budget, moe, 3, 100)
    points = [bench.curves.point(moe.budget, architecture, moe(architecture)) for architecture in asked]
    assert history[:100] == pytest.approx(bench.curves.shares(points, truth), abs=1e-5)


def test_the_committed_result_is_that_of_the_committed_curves(bench):
    result = json.loads((FOLDER / "result.json").read_text())
    again = json.loads(json.dumps(bench.run.summary(bench.run.read_rows())))
    assert result["methods"] == again
    assert min(row["seeds"] for row in result["methods"] if row["method"] not in bench.run.WITHOUT_CHANCE) >= 10
