"""The ground truth's tables and the scores that are read off them, without training anything."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moesaic.nas.context import Context
from moesaic.nas.costs.price import Pricer
from moesaic.search_spaces import load_space, preset_source

FOLDER = Path(__file__).parents[2] / "experiments" / "fidelity"
sys.path.insert(0, str(FOLDER))  # a script finds its neighbours so
members, score, truth = (importlib.import_module(name) for name in ("members", "score", "truth"))

SPACE = load_space(preset_source("small"))
PRICER = Pricer(Context(1024, 128, 8))
losses = st.lists(st.floats(2, 4), min_size=12, max_size=12, unique=True)


def made_up(second: np.ndarray, flops: np.ndarray, first: np.ndarray | None = None) -> "score.Truth":
    chosen = members.stratified(SPACE, PRICER, 8e5, 0)[-len(second) :]
    seeds = np.stack([second if first is None else first, second])
    return score.Truth([m.architecture for m in chosen], [m.stratum for m in chosen], seeds, flops, flops)


def test_the_set_covers_the_range_and_the_band():
    chosen = members.stratified(SPACE, PRICER, 8e5, 0)
    flops = {m.number: PRICER.expected(m.architecture)["flops"] for m in chosen}
    spread = [flops[m.number] for m in chosen if m.stratum == "spread"]
    band = [flops[m.number] for m in chosen if m.stratum.startswith("band")]
    assert len({m.architecture for m in chosen}) == len(chosen) >= 40
    assert spread == sorted(spread)
    assert max(spread) / min(spread) > 3
    assert len(band) == members.BAND_RANDOM + members.BAND_UNIFORM + members.BAND_DENSE >= 10
    assert max(abs(value / 8e5 - 1) for value in band) <= members.BAND_WIDTH
    assert chosen == members.stratified(SPACE, PRICER, 8e5, 0)


@given(losses, losses)
def test_tau_over_pairs_of_one_band_is_kendalls_when_all_are_in_it(judged, true):
    judged, true = np.array(judged), np.array(true)
    found = score.near_tau(judged, true, np.full(12, 1e6))
    assert found == pytest.approx(stats.kendalltau(judged, true).statistic)


def test_pairs_of_different_flops_do_not_count():
    flops = np.array([1.0, 1.05, 2.0, 2.1]) * 1e6
    true = np.array([3.0, 2.9, 2.5, 2.4])
    assert score.near_tau(np.array([3.0, 2.9, 9.5, 9.4]), true, flops) == 1
    assert score.near_tau(np.array([2.9, 3.0, 0.5, 0.4]), true, flops) == 0


def test_a_correction_recovers_what_costs_and_inherited_losses_say_together():
    rng = np.random.default_rng(0)
    flops, inherited = rng.uniform(5e5, 2e6, 20), rng.normal(3, 0.1, 20)
    found = made_up(inherited - 0.5 * np.log(flops), flops)
    x = score.columns(found, inherited)
    assert score.corrected(x[:, :3], found, 14)["tau"] > 0.9
    assert score.corrected(x[:, 1:3], found, 14)["tau"] < 0.8


def test_a_seed_that_repeats_the_other_is_a_perfect_ceiling():
    found = made_up(np.linspace(3, 2, 20), np.linspace(1e6, 2e6, 20))
    ceiling = score.ceiling(found)
    assert ceiling["all"]["tau"] == ceiling["near"]["tau"] == 1
    assert ceiling["seed_deviation"] == 0
    assert score.assess(-found.loss, found)["all"]["tau"] == -1


def test_a_change_is_compared_with_the_base_of_its_seed():
    found = made_up(np.linspace(3, 2, 20), np.full(20, 1e6))
    rows = [{"seed": 0, "losses": list(-found.loss), "seconds": 3.0}]
    row = score.change_row("worse", rows, {0: found.loss}, found)
    assert row["near"] == pytest.approx(-1)
    assert row["gain"] == pytest.approx(-2)
    assert row["gain_interval"] == pytest.approx((-2, -2))
    assert row["regret"] == pytest.approx(0.5)


def test_a_member_without_every_seed_is_named(tmp_path):
    for number in range(2):
        row = {"member": number, "stratum": "band", "architecture": SPACE.smallest.to_dict()}
        truth.append_row(tmp_path / "members.jsonl", row)
    values = {"test_loss": 3.0, "flops": 1, "parameters": 1}
    for member, seed in ((0, 0), (1, 0), (0, 1)):
        truth.append_row(tmp_path / "truth.jsonl", {"member": member, "seed": seed, **values})
    with pytest.raises(AssertionError, match=r"\[1\]"):
        score.read_truth(tmp_path)
    truth.append_row(tmp_path / "truth.jsonl", {"member": 1, "seed": 1, **values})
    assert score.read_truth(tmp_path).losses.shape == (2, 2)


def test_committed_tables_are_whole():
    folder = FOLDER / "small"
    found = score.read_truth(folder)
    changes = [json.loads(line) for line in (folder / "ablation.jsonl").read_text().splitlines()]
    assert len(found.loss) >= 40
    assert found.band.sum() >= 10
    assert len(found.losses) >= 2
    assert np.isfinite(found.losses).all()
    assert all(len(row["losses"]) == len(found.loss) for row in changes)
