"""Stage fidelity: what it tests and trains, that it continues and survives a bad member, and what is said of it."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import kendalltau

from moesaic.nas.config import load_config
from moesaic.nas.pipeline import run_stages
from moesaic.nas.report.ranking_section import trust_section
from moesaic.nas.search.loop import result_of
from moesaic.nas.search.trials import Trial, read_trials
from moesaic.nas.stages import check_fidelity
from moesaic.nas.stages.check_fidelity import choose_members, load_judged, run_fidelity
from moesaic.nas.stages.export_models import run_export
from moesaic.nas.stages.run import Run
from moesaic.nas.terminal.progress import Reporter
from moesaic.nas.training import workers
from moesaic.nas.trust.correction import Correction
from moesaic.nas.trust.judges import compare_judges, correction_of, judged_trial
from moesaic.nas.trust.sentences import check_sentence, corrects, flops_sentence, front_sentence, rivals_sentence
from moesaic.search_spaces import Interrupted, MoesaicError, StageFailed, load_space, preset_source
from moesaic.search_spaces.files import read_json
from moesaic.supernet import Evaluation

QUICK = (
    "supernet.steps=3",
    "latency.models=8",
    "latency.batch_size=1",
    "search.trials=14",
    "fidelity.check=4",
    "fidelity.steps=3",
)


@pytest.fixture(scope="module")
def searched(micro_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory in which the search is done."""
    path = tmp_path_factory.mktemp("fidelity") / "run"
    run = open_run(micro_config, path)
    for stage in ("supernet", "latency", "search"):
        run_stages(run, run.reporter.console, stage)
    return path


def open_run(config: Path, path: Path, *overrides: str, should_stop: Callable[[], bool] = lambda: False) -> Run:
    loaded = load_config(config, [*QUICK, *overrides])
    return Run(loaded, path, Reporter(Console(file=io.StringIO(), width=200)), should_stop)


@pytest.fixture
def fresh(searched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(searched, tmp_path / "run"))


def found(run: Run) -> dict:
    return read_json(run.stages["fidelity"].path / "fidelity.json")


def test_it_tests_the_front_and_trains_members(micro_config, fresh):
    run = open_run(micro_config, fresh)
    run_fidelity(run)
    result = result_of(read_trials(fresh / "search" / "trials.jsonl"))
    assert result is not None
    trust = found(run)
    assert [row["name"] for row in trust["front"]] == [f"trial {trial.number}" for trial in result.front]
    assert [row["loss"] for row in trust["front"]] == pytest.approx([trial.loss for trial in result.front])
    assert [row["standard_error"] for row in trust["front"]] == pytest.approx([t.standard_error for t in result.front])
    assert trust["front"][0]["above_best"]["mean"] == 0
    assert not trust["front"][0]["differs"]
    rivals = trust["contenders"]
    assert {rival["kind"] for rival in rivals} == {
        rival["kind"] for rival in json.loads((fresh / "search" / "rivals.json").read_text())
    }
    assert [row["loss"] for row in trust["rivals"]] == pytest.approx([rival["loss"] for rival in rivals])
    flops = trust["flops"]
    assert flops is None or 0 <= flops["before"]["median"] <= flops["before"]["largest"]
    assert flops is None or 0 <= flops["after"]["median"] <= flops["after"]["largest"] < 0.5
    check = trust["check"]
    with open(fresh / "fidelity" / "check.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [int(row["trial"]) for row in table] == [row["trial"] for row in check["members"]]
    assert len(table) == 4
    assert check["members"][0]["trial"] == result.best.number
    assert all(0 < row["retrained_loss"] < 10 for row in check["members"])
    assert {judge["count"] for judge in check["judges"].values()} == {4}
    assert not list((fresh / "fidelity").rglob("*.safetensors"))
    assert "complete" in said(run, run_fidelity)


def said(run: Run, stage: Callable[[Run], None]) -> str:
    stage(run)
    file = run.reporter.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_without_a_check_nothing_is_trained(micro_config, fresh):
    run = open_run(micro_config, fresh, "fidelity.check=0")
    run_fidelity(run)
    assert found(run)["check"] is None
    assert found(run)["front"]
    assert {path.name for path in (fresh / "fidelity").iterdir()} == {
        "inputs.json",
        "artifact.json",
        "digest",
        "fidelity.json",
    }


def test_stopped_after_a_member_it_continues_with_the_next(micro_config, fresh, tmp_path, monkeypatch):
    whole = open_run(micro_config, Path(shutil.copytree(fresh, tmp_path / "whole")))
    run_fidelity(whole)

    def one_is_trained() -> bool:
        return bool(list((fresh / "fidelity").glob("*/model.safetensors")))

    stopped = open_run(micro_config, fresh, should_stop=one_is_trained)
    with pytest.raises(Interrupted):
        run_fidelity(stopped)
    assert not stopped.stages["fidelity"].complete
    trained: list[str] = []
    train = workers.train

    def remember(*arguments, **settings) -> None:
        trained.append(arguments[3].name)
        train(*arguments, **settings)

    monkeypatch.setattr(workers, "train", remember)
    run = open_run(micro_config, fresh)
    run_fidelity(run)
    assert trained == [row["fingerprint"] for row in found(whole)["check"]["members"][1:]]
    assert found(run) == found(whole)


def test_a_member_that_diverges_is_left_out(micro_config, fresh, monkeypatch):
    run = open_run(micro_config, fresh, "fidelity.check=5")
    retrain = check_fidelity.retrain
    calls = []

    def one_fails(*arguments, **settings):
        calls.append(arguments[0])
        if len(calls) == 2:
            raise StageFailed("training diverged at step 1")
        return retrain(*arguments, **settings)

    monkeypatch.setattr(check_fidelity, "retrain", one_fails)
    assert "is left out: training diverged" in said(run, run_fidelity)
    check = found(run)["check"]
    assert [row["retrained_loss"] is None for row in check["members"]] == [False, True, False, False, False]
    assert check["judges"]["inherited loss"]["count"] == 4
    assert "ranked 4 members (1 more diverged)" in check_sentence(check)
    assert 'id="ranking"' in "".join(trust_section(found(run)))


def test_when_all_diverge_the_stage_still_ends(micro_config, fresh):
    run = open_run(
        micro_config, fresh, "retrain.learning_rate=1e12", "retrain.clip_norm=1e12", "retrain.warmup_steps=0"
    )
    run_fidelity(run)
    check = found(run)["check"]
    assert check["judges"] is None
    assert {row["retrained_loss"] for row in check["members"]} == {None}
    assert "Only 0 members were trained from scratch (4 more diverged)" in check_sentence(check)
    assert 'id="ranking"' not in "".join(trust_section(found(run)))


def test_what_is_exported_follows_the_check_and_not_how_models_are_trained_later(micro_config, fresh):
    run, other = open_run(micro_config, fresh), open_run(micro_config, fresh, "fidelity.check=5")
    assert run.stages["search"].fingerprint == other.stages["search"].fingerprint
    for stage in ("fidelity", "export", "retrain", "report"):
        assert run.stages[stage].fingerprint != other.stages[stage].fingerprint
    more_steps = open_run(micro_config, fresh, "retrain.steps=7", "retrain.init=inherited")
    assert more_steps.stages["fidelity"].fingerprint == run.stages["fidelity"].fingerprint
    with pytest.raises(MoesaicError, match="needs stage fidelity"), run.work("export"):
        pass


ARCHITECTURE = load_space(preset_source("tiny")).smallest
TRIAL = Trial(0, "evaluated", ARCHITECTURE, {}, {"flops": -0.1})


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(4, 12))
def test_members_are_spread_over_the_order_and_the_best_is_one(losses, count):
    trials = [replace(TRIAL, number=number, loss=float(loss)) for number, loss in enumerate(losses)]
    outside = replace(TRIAL, number=99, loss=-1.0, excess={"flops": 0.1})
    order = sorted(trials, key=lambda t: (t.loss, t.number))
    members = choose_members([outside, *trials], count)
    places = [order.index(member) for member in members]
    assert len(members) == min(count, len(trials))
    assert places[0] == 0
    assert places[-1] == len(trials) - 1
    assert np.ptp(np.diff(places)) <= 1 if len(places) > 1 else True


def rows_of(inherited, retrained, flops) -> list[dict]:
    return [
        {"trial": n, "inherited_loss": i, "retrained_loss": r, "flops": f, "parameters": 1000.0 * f}
        for n, (i, r, f) in enumerate(zip(inherited, retrained, flops, strict=True))
    ]


def test_judges_are_compared_by_the_losses_of_those_that_finished():
    judges = compare_judges(rows_of([1, 2, 3, 4, 9], [2.0, 2.1, 2.2, 2.3, None], [1, 2, 3, 4, 5]))
    assert judges is not None
    assert judges["inherited loss"]["tau"] == pytest.approx(1)
    assert judges["counting FLOPs"]["tau"] == judges["counting parameters"]["tau"] == pytest.approx(-1)
    assert judges["counting FLOPs"]["regret"][1] == pytest.approx(0.15)
    assert compare_judges(rows_of([1, 2, 3, 4], [2.0, 2.1, None, 2.3], [1, 2, 3, 4])) is None


def judged(inherited, retrained, flops) -> str:
    rows = rows_of(inherited, retrained, flops)
    return check_sentence(json.loads(json.dumps({"steps": 9, "members": rows, "judges": compare_judges(rows)})))


def test_the_verdict_says_when_counting_is_as_good_and_when_the_interval_is_wide():
    rising = [2.0 + n for n in range(12)]
    mixed = [3.0, 2.0, 6.0, 5.0, 4.0, 7.0, 10.0, 9.0, 8.0, 11.0, 13.0, 12.0]
    good = judged(rising, rising, mixed)
    assert "tau 1.00 [1.00, 1.00]" in good
    assert "no better" not in good
    assert "wide" not in good
    equal = judged([-f for f in mixed], rising, mixed)
    assert "no better than counting FLOPs or counting parameters" in equal
    assert "with 4 members the interval is wide" in judged(rising[:4], mixed[:4], mixed[:4])
    assert "fidelity.check=8" in check_sentence(None)


def wide_and_narrow(count: int) -> tuple[list[Trial], list[dict]]:
    """Trials of a supernet that favours narrow slices, and their stand-alone losses: half of what inheritance says,
    less something for every step of width."""
    rng, trials, rows = Random(0), [], []
    space = load_space(preset_source("small"))
    for number in range(count):
        architecture = space.sample_balanced(rng)
        costs = {"flops": 1e6, "active_parameters": 1e5, "parameters": 1e5}
        loss = 3 + rng.random() / 10
        trials.append(Trial(number, "evaluated", architecture, costs, {"flops": -0.1}, loss=loss))
        retrained = 0.5 * loss - architecture.decoder.width / 200
        rows.append({"trial": number, "inherited_loss": loss, "retrained_loss": retrained, **costs})
    return trials, rows


def test_trainings_correct_a_bias_and_are_left_out_of_their_own_correction():
    trials, rows = wide_and_narrow(24)
    trained = rows[:16]
    correction = correction_of(trials, trained)
    assert correction is not None
    judges = compare_judges(trained, correction)
    assert judges is not None
    assert corrects(judges)
    assert judges["inherited loss, corrected"]["tau"] > 0.8 > judges["inherited loss"]["tau"]
    unseen = correction([judged_trial(trial) for trial in trials[16:]])
    truth = np.array([row["retrained_loss"] for row in rows[16:]])
    assert kendalltau(unseen, truth).statistic > 0.8
    alone = Correction(correction.features[1:], correction.losses[1:]).predict(correction.features[:1])
    assert correction.left_out()[0] == pytest.approx(alone[0])
    assert correction_of(trials, rows[:7]) is None
    assert "decide what is exported" in check_sentence({"steps": 9, "members": trained, "judges": judges})


def test_a_correction_of_noise_is_not_used():
    trials, rows = wide_and_narrow(16)
    for row in rows:
        row["retrained_loss"] = row["inherited_loss"]
    judges = compare_judges(rows, correction_of(trials, rows))
    assert judges is not None
    assert judges["inherited loss"]["tau"] == pytest.approx(1)
    assert not corrects(judges)
    assert "which decide" in check_sentence({"steps": 9, "members": rows, "judges": judges})


def test_a_column_that_does_not_vary_says_nothing():
    x = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    predicted = Correction(x, np.array([1.0, 2.0, 3.0])).predict(np.array([[2.5, 5.0], [2.5, 9.0]]))
    assert predicted[0] == predicted[1]
    assert 2 < predicted[0] < 2.5


def test_corrected_losses_choose_what_is_exported(micro_config, fresh, monkeypatch):
    """Stand-alone losses are made up to favour the trial that inheritance puts last."""
    run = open_run(micro_config, fresh, "fidelity.check=8")
    trials = [trial for trial in read_trials(fresh / "search" / "trials.jsonl") if trial.feasible]
    order = {t.architecture.fingerprint: place for place, t in enumerate(sorted(trials, key=lambda t: t.loss or 0))}
    monkeypatch.setattr(
        check_fidelity,
        "_train",
        lambda run, stage, trial, on_step: Evaluation(3 - 0.1 * order[trial.architecture.fingerprint], 0.01, 10, ()),
    )
    run_fidelity(run)
    judged = load_judged(run)
    assert set(judged) == {str(trial.number) for trial in trials}
    assert "decide what is exported" in check_sentence(found(run)["check"])
    run_export(run)
    best = read_json(run.stages["export"].path / "best" / "figures.json")
    assert str(best["trial"]) == min(judged, key=lambda number: judged[number])
    assert best["trial"] != min(trials, key=lambda trial: trial.loss or 0).number


def test_sentences_on_what_losses_tell_apart():
    best = {"name": "trial 3", "loss": 3.0, "standard_error": 0.03, "differs": False, "level": 1}
    near = {**best, "name": "trial 5", "loss": 3.01}
    far = {**best, "name": "trial 7", "loss": 3.4, "differs": True, "level": 2}
    above = {"mean": 0.02, "standard_error": 0.004}
    rivals = [
        {"name": "uniform", "differs": True, "above_best": above},
        {"name": "dense", "differs": False, "above_best": {"mean": -0.001, "standard_error": 0.004}},
    ]
    trust = {"sequences": 64, "front": [best, near, far], "neighbours_that_differ": 1, "rivals": rivals, "check": None}
    errors = {"before": {"median": 0.011, "largest": 0.054}, "after": {"median": 0.001, "largest": 0.007}}
    assert "1.1% in the median and 5.4% at most" in flops_sentence({"models": 16, **errors})
    assert "exact" in flops_sentence(None)
    text = front_sentence(trust)
    assert "2 levels apart among the 3 members" in text
    assert "1 of 2 others differ from the best one, and 1 of 2 pairs" in text
    assert "better than uniform (difference +0.0200 ± 0.0040)" in rivals_sentence(trust)
    assert "not distinguishable from dense" in rivals_sentence(trust)
    rivals[0]["above_best"] = {**above, "mean": -0.02}
    assert "significantly worse than uniform" in rivals_sentence(trust)
    assert rivals_sentence({**trust, "rivals": []}) == ""
    assert "one member" in front_sentence({**trust, "front": [best]})
