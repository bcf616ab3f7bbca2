"""The ground truth's tables and the scores that are read off them, without training anything."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.common import append_row, read_rows
from experiments.fidelity import ablation, members, score, stability, truth
from moesaic import Architecture, Context, Pricer, load_config, read_value
from moesaic.search_spaces import load_space, preset_source

SPACE = load_space(preset_source("small"))
PRICER = Pricer(Context(1024, 128, 8))
losses = st.lists(st.floats(2, 4), min_size=12, max_size=12, unique=True)


def made_up(second: np.ndarray, flops: np.ndarray, first: np.ndarray | None = None) -> score.Truth:
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
        append_row(tmp_path / "members.jsonl", row)
    values = {"test_loss": 3.0, "flops": 1, "parameters": 1}
    for member, seed in ((0, 0), (1, 0), (0, 1)):
        append_row(tmp_path / "truth.jsonl", {"member": member, "seed": seed, **values})
    with pytest.raises(AssertionError, match=r"\[1\]"):
        score.read_truth(tmp_path)
    append_row(tmp_path / "truth.jsonl", {"member": 1, "seed": 1, **values})
    assert score.read_truth(tmp_path).losses.shape == (2, 2)


def test_committed_tables_are_whole():
    folder = truth.HERE / "small"
    found = score.read_truth(folder)
    assert len(found.loss) >= 40
    assert found.band.sum() >= 10
    assert len(found.losses) >= 2
    assert np.isfinite(found.losses).all()
    assert all(len(row["losses"]) == len(found.loss) for row in read_rows(folder / "ablation.jsonl"))
    trained = {row["member"]: row["fingerprint"] for row in read_rows(folder / "truth.jsonl")}
    chosen = {row["member"]: row["architecture"] for row in read_rows(folder / "members.jsonl")}
    assert trained == {number: Architecture.from_dict(plain).fingerprint for number, plain in chosen.items()}


@pytest.mark.parametrize("variant", ["small", "gpu"])
def test_every_change_that_is_left_can_be_trained(variant):
    changes = yaml.safe_load((truth.HERE / variant / "ablation.yaml").read_text())
    assert "base" in changes
    for change in changes.values():
        load_config(truth.HERE / f"{variant}.yaml", change.get("overrides", []))


def test_the_committed_result_is_that_of_the_committed_tables():
    folder = truth.HERE / "small"
    result, found = read_value(folder / "result.json", dict), score.read_truth(folder)
    assert score.ceiling(found)["near"]["tau"] == pytest.approx(result["ceiling"]["near"]["tau"])
    (base,) = (row for row in result["changes"] if row["change"] == "base")
    rows = [row for row in read_rows(folder / "ablation.jsonl") if row["change"] == "base"]
    again = score.change_row("base", rows, {}, found)
    assert {key: again[key] for key in ("tau", "near", "regret")} == pytest.approx(
        {key: base[key] for key in ("tau", "near", "regret")}
    )


@pytest.fixture
def micro(micro_config, monkeypatch, tmp_path):
    """The experiment in its smallest form: the micro run's space, text and steps, and two members."""
    monkeypatch.setattr(truth, "HERE", tmp_path)
    (tmp_path / "small.yaml").write_text(micro_config.read_text())
    (tmp_path / "small").mkdir()
    space = load_config(micro_config).space
    for number, member in enumerate((space.smallest, space.largest)):
        row = {"member": number, "stratum": "spread", "architecture": member.to_dict()}
        append_row(tmp_path / "small" / "members.jsonl", row)
    return tmp_path / "small"


def test_a_member_is_trained_alone(micro):
    plain = read_rows(micro / "members.jsonl")[1]["architecture"]
    row = truth.train_alone("small", (), plain, 0)
    assert row["fingerprint"] == Architecture.from_dict(plain).fingerprint
    assert 0 < row["test_loss"] < 20
    assert row["parameters"] >= row["active_parameters"] > 0
    assert truth.train_alone("small", (), plain, 0)["test_loss"] == row["test_loss"]


def test_a_supernet_judges_every_member_and_members_are_fine_tuned(micro, tmp_path):
    change = {"overrides": ["supernet.sharing=packed"], "fine_tune": [2]}
    plain, tuned = ablation.score("small", "packed sharing", change, 1, tmp_path)
    assert plain["change"] == "packed sharing"
    assert plain["overrides"] == ["supernet.sharing=packed", "seed=1"]
    assert tuned["change"] == "packed sharing, members fine-tuned 2 steps"
    assert len(plain["losses"]) == len(plain["flops"]) == len(tuned["losses"]) == 2
    assert plain["losses"] != tuned["losses"]
    assert (tmp_path / "packed sharing-1.safetensors").exists()


def test_initial_weights_change_the_curve(micro, monkeypatch):
    monkeypatch.setattr(stability, "FOLDER", micro)
    monkeypatch.setattr(stability, "EVERY", 2)
    run = truth.open_variant("small")
    old, new = (stability.curve(run, 1, 0, 4, start) for start in ("0.02 everywhere", "this tool's"))
    assert len(old["losses"]) == len(new["losses"]) == 2
    assert old["losses"] != new["losses"]
