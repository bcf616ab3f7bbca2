"""Stage fidelity: what it tests and trains, that it continues and survives a bad member, and what is said of it."""

from __future__ import annotations

import csv
import io
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
from moesaic.nas.search.rivals import Rival
from moesaic.nas.search.trials import Trial, read_trials
from moesaic.nas.stages import check_fidelity
from moesaic.nas.stages.check_fidelity import choose_members, has_threshold_router, load_trust
from moesaic.nas.stages.export_models import load_exports
from moesaic.nas.stages.run import Run
from moesaic.nas.terminal.progress import Reporter
from moesaic.nas.training import trainer
from moesaic.nas.trust.correction import Correction
from moesaic.nas.trust.findings import Check, CheckedMember, Errors, FlopsErrors, Standing, Trust
from moesaic.nas.trust.judges import compare_judges, correction_of, judged_trial
from moesaic.nas.trust.scores import Difference
from moesaic.nas.trust.sentences import check_sentence, corrects, flops_sentence, front_sentence, rivals_sentence
from moesaic.search_spaces import Interrupted, MoesaicError, StageFailed, load_space, preset_source
from moesaic.search_spaces.files import read_value, write_value
from moesaic.supernet import Evaluation
from tests.nas.run_tools import do_stage, only, said

QUICK = (
    "supernet.steps=3",
    "latency.models=8",
    "latency.batch_size=1",
    "search.trials=14",
    "space={preset: tiny, layer: {routers: [{kind: threshold, threshold: [0.4, 0.7], max_k: [2, 4]}]}}",
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


def found(run: Run) -> Trust:
    return load_trust(only(run))


def check_of(run: Run) -> Check:
    check = found(run).check
    assert check is not None
    return check


def test_it_tests_the_front_and_trains_members(micro_config, fresh):
    run = open_run(micro_config, fresh)
    do_stage(run, "fidelity")
    result = result_of(read_trials(fresh / "search" / "trials.jsonl"))
    assert result is not None
    trust = found(run)
    assert [row.name for row in trust.front] == [f"trial {trial.number}" for trial in result.front]
    assert [row.loss for row in trust.front] == pytest.approx([trial.loss for trial in result.front])
    assert [row.standard_error for row in trust.front] == pytest.approx([t.standard_error for t in result.front])
    assert trust.front[0].above_best.mean == 0
    assert not trust.front[0].differs
    judged = read_value(fresh / "search" / "rivals.json", list[Rival])
    assert {rival.kind for rival in trust.chosen_rivals} == {rival.kind for rival in judged} == {"uniform", "dense"}
    for rival in trust.chosen_rivals:
        assert rival.loss == min(other.loss for other in judged if other.kind == rival.kind)
    assert [row.loss for row in trust.rivals] == pytest.approx([rival.loss for rival in trust.chosen_rivals])
    thresholds = [t for t in read_trials(fresh / "search" / "trials.jsonl") if has_threshold_router(t.architecture)]
    assert trust.flops is not None
    assert trust.flops.models == min(16, sum(trial.feasible for trial in thresholds)) > 0
    assert 0 <= trust.flops.before.median <= trust.flops.before.largest
    assert 0 <= trust.flops.after.median <= trust.flops.after.largest < 0.5
    check = check_of(run)
    with open(fresh / "fidelity" / "check.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [int(row["trial"]) for row in table] == [member.trial for member in check.members]
    assert len(table) == 4
    assert check.members[0].trial == result.best.number
    assert all(0 < (member.retrained_loss or 0) < 10 for member in check.members)
    assert check.judges is not None
    assert {judge.count for judge in check.judges.values()} == {4}
    assert not list((fresh / "fidelity").rglob("*.safetensors"))
    do_stage(run, "fidelity")
    assert "fidelity: complete, skipped" in said(run)


def test_without_a_check_nothing_is_trained(micro_config, fresh):
    run = open_run(micro_config, fresh, "fidelity.check=0")
    do_stage(run, "fidelity")
    assert found(run).check is None
    assert found(run).front
    assert {path.name for path in (fresh / "fidelity").iterdir()} == {"inputs.json", "artifact.json", "fidelity.json"}


def test_stopped_after_a_member_it_continues_with_the_next(micro_config, fresh, tmp_path, monkeypatch):
    whole = open_run(micro_config, Path(shutil.copytree(fresh, tmp_path / "whole")))
    do_stage(whole, "fidelity")

    def one_is_trained() -> bool:
        return bool(list((fresh / "fidelity").glob("*/model.safetensors")))

    stopped = open_run(micro_config, fresh, should_stop=one_is_trained)
    with pytest.raises(Interrupted):
        do_stage(stopped, "fidelity")
    assert not only(stopped).folder("fidelity").complete
    trained: list[str] = []
    train = trainer.train

    def remember(*arguments, **settings) -> None:
        trained.append(arguments[3].name)
        train(*arguments, **settings)

    monkeypatch.setattr(trainer, "train", remember)
    run = open_run(micro_config, fresh)
    do_stage(run, "fidelity")
    assert trained == [member.fingerprint for member in check_of(whole).members[1:]]
    assert found(run) == found(whole)


def test_a_member_that_diverges_is_left_out(micro_config, fresh, monkeypatch):
    run = open_run(micro_config, fresh, "fidelity.check=5")
    train = trainer.train
    calls = []

    def one_fails(*arguments, **settings):
        calls.append(arguments[0])
        if len(calls) == 2:
            raise StageFailed("training diverged at step 1")
        train(*arguments, **settings)

    monkeypatch.setattr(trainer, "train", one_fails)
    do_stage(run, "fidelity")
    assert "is left out: training diverged" in said(run)
    check = check_of(run)
    assert [member.retrained_loss is None for member in check.members] == [False, True, False, False, False]
    assert check.judges is not None
    assert check.judges["inherited loss"].count == 4
    assert "ranked 4 members (1 more diverged)" in check_sentence(check)
    assert 'id="ranking"' in "".join(trust_section(found(run), "nats"))


def test_when_all_diverge_the_stage_still_ends(micro_config, fresh):
    run = open_run(
        micro_config, fresh, "retrain.learning_rate=1e12", "retrain.clip_norm=1e12", "retrain.warmup_steps=0"
    )
    do_stage(run, "fidelity")
    check = check_of(run)
    assert check.judges is None
    assert {member.retrained_loss for member in check.members} == {None}
    assert "Only 0 members were trained alone (4 more diverged)" in check_sentence(check)
    assert 'id="ranking"' not in "".join(trust_section(found(run), "nats"))


def test_what_is_exported_follows_the_check_and_not_how_models_are_trained_later(micro_config, fresh):
    run, other = open_run(micro_config, fresh), open_run(micro_config, fresh, "fidelity.check=5")
    assert run.folder("search").fingerprint == other.folder("search").fingerprint
    for stage in ("fidelity", "export", "retrain", "report"):
        assert only(run).folder(stage).fingerprint != only(other).folder(stage).fingerprint
    more_steps = open_run(micro_config, fresh, "retrain.steps=7", "retrain.init=inherited")
    assert only(more_steps).folder("fidelity").fingerprint == only(run).folder("fidelity").fingerprint
    with pytest.raises(MoesaicError, match="needs stage fidelity"):
        do_stage(run, "export")


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


def rows_of(inherited, retrained, flops) -> list[CheckedMember]:
    return [
        CheckedMember(n, str(n), i, 0.01, r, r and 0.01, f, 100.0 * f, 1000.0 * f)
        for n, (i, r, f) in enumerate(zip(inherited, retrained, flops, strict=True))
    ]


def test_judges_are_compared_by_the_losses_of_those_that_finished():
    judges = compare_judges(rows_of([1, 2, 3, 4, 9], [2.0, 2.1, 2.2, 2.3, None], [1, 2, 3, 4, 5]))
    assert judges is not None
    assert judges["inherited loss"].tau == pytest.approx(1)
    assert judges["counting FLOPs"].tau == judges["counting parameters"].tau == pytest.approx(-1)
    assert judges["counting FLOPs"].regret[1] == pytest.approx(0.15)
    assert compare_judges(rows_of([1, 2, 3, 4], [2.0, 2.1, None, 2.3], [1, 2, 3, 4])) is None


def judged(path: Path, inherited, retrained, flops) -> str:
    rows = rows_of(inherited, retrained, flops)
    write_value(path, Check(9, tuple(rows), compare_judges(rows)))
    return check_sentence(read_value(path, Check))


def test_the_verdict_says_when_counting_is_as_good_and_when_the_interval_is_wide(tmp_path):
    rising = [2.0 + n for n in range(12)]
    mixed = [3.0, 2.0, 6.0, 5.0, 4.0, 7.0, 10.0, 9.0, 8.0, 11.0, 13.0, 12.0]
    path = tmp_path / "check.json"
    good = judged(path, rising, rising, mixed)
    assert "tau 1.00 [0.87, 1.00]" in good
    assert "no better" not in good
    assert "wide" not in good
    equal = judged(path, [-f for f in mixed], rising, mixed)
    assert "no better than counting FLOPs or counting parameters" in equal
    assert "with 4 members the interval is wide" in judged(path, rising[:4], mixed[:4], mixed[:4])
    assert "fidelity.check=8" in check_sentence(None)


def wide_and_narrow(count: int) -> tuple[list[Trial], list[CheckedMember]]:
    """Trials of a supernet that favours narrow slices, and their stand-alone losses: half of what inheritance says,
    less something for every step of width."""
    rng, trials, rows = Random(0), [], []
    space = load_space(preset_source("small"))
    for number in range(count):
        architecture = space.sample_balanced(rng)
        costs = {"flops": 1e6, "active_parameters": 1e5, "parameters": 1e5}
        loss = 3 + rng.random() / 10
        trials.append(Trial(number, "evaluated", architecture, costs, {"flops": -0.1}, loss=loss))
        retrained = 0.5 * loss - architecture.output.width / 200
        rows.append(CheckedMember(number, architecture.fingerprint, loss, 0.01, retrained, 0.01, **costs))
    return trials, rows


def test_trainings_correct_a_bias_and_are_left_out_of_their_own_correction():
    trials, rows = wide_and_narrow(24)
    trained = rows[:16]
    correction = correction_of(trials, trained)
    assert correction is not None
    judges = compare_judges(trained, correction)
    assert judges is not None
    assert corrects(judges)
    corrected, inherited = judges["inherited loss, corrected"].tau, judges["inherited loss"].tau
    assert corrected is not None and inherited is not None
    assert corrected > 0.8 > inherited
    unseen = correction([judged_trial(trial) for trial in trials[16:]])
    truth = np.array([row.retrained_loss for row in rows[16:]])
    assert kendalltau(unseen, truth).statistic > 0.8
    alone = Correction(correction.features[1:], correction.losses[1:]).predict(correction.features[:1])
    assert correction.left_out()[0] == pytest.approx(alone[0])
    assert correction_of(trials, rows[:7]) is None
    assert "decide what is exported" in check_sentence(Check(9, tuple(trained), judges))


def test_a_correction_of_noise_is_not_used():
    trials, rows = wide_and_narrow(16)
    rows = [replace(row, retrained_loss=row.inherited_loss) for row in rows]
    judges = compare_judges(rows, correction_of(trials, rows))
    assert judges is not None
    assert judges["inherited loss"].tau == pytest.approx(1)
    assert not corrects(judges)
    assert "which decide" in check_sentence(Check(9, tuple(rows), judges))


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
        lambda part, directory, trial, on_step: Evaluation(
            3 - 0.1 * order[trial.architecture.fingerprint], 0.01, 10, ()
        ),
    )
    do_stage(run, "fidelity")
    corrected = found(run).corrected
    assert set(corrected) == {trial.number for trial in trials}
    assert "decide what is exported" in check_sentence(check_of(run))
    do_stage(run, "export")
    best = load_exports(only(run))[0]
    assert best.trial == min(corrected, key=lambda number: corrected[number])
    assert best.trial != min(trials, key=lambda trial: trial.loss or 0).number


def test_sentences_on_what_losses_tell_apart():
    above = Difference(0.02, 0.004, 0.012, 0.028, 0.001)
    best = Standing("trial 3", "a", 3.0, 0.03, Difference(0, 0, 0, 0, 1), 1.0, False, 1)
    near = replace(best, name="trial 5", loss=3.01)
    far = replace(best, name="trial 7", loss=3.4, differs=True, level=2)
    uniform = Standing("uniform", "b", 3.02, 0.03, above, 0.001, True)
    dense = Standing("dense", "c", 2.999, 0.03, replace(above, mean=-0.001), 0.8, False)
    errors = FlopsErrors(16, Errors(0.011, 0.054), Errors(0.001, 0.007))
    trust = Trust(64, (best, near, far), 1, (uniform, dense), errors, None, {}, ())
    assert "1.1% in the median and 5.4% at most" in flops_sentence(errors)
    assert "exact" in flops_sentence(None)
    text = front_sentence(trust)
    assert "2 levels apart among the 3 members" in text
    assert "1 of the 2 others differ from the best one, and 1 of 2 pairs" in text
    assert "better than uniform (difference +0.0200 ± 0.0040)" in rivals_sentence(trust)
    assert "not distinguishable from dense" in rivals_sentence(trust)
    worse = replace(uniform, above_best=replace(above, mean=-0.02))
    assert "significantly worse than uniform" in rivals_sentence(replace(trust, rivals=(worse, dense)))
    assert rivals_sentence(replace(trust, rivals=())) == ""
    assert "one member" in front_sentence(replace(trust, front=(best,)))
