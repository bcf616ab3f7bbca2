"""Exports against the budget: what is over when it is measured is refused or flagged, never shipped silently."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moesaic
from moesaic.nas.costs.compliance import STATUSES, TOLERANCE, MeasuredLine, lines_text, status_of, worst_status
from moesaic.nas.costs.latency.calibrate import calibrate
from moesaic.nas.costs.latency.timing import AnchoredTiming
from moesaic.nas.costs.measure import MeasuredCosts, measure_costs
from moesaic.nas.exports.figures import INHERITED_BEST, ExportFigures
from moesaic.nas.search.budget import Budget, BudgetLine
from moesaic.nas.search.trials import Trial, read_trials
from moesaic.nas.stages.export_models import load_exports
from moesaic.nas.stages.retrain_models import SEARCHED, compared_models, load_results
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.write_report import build_summary, gather
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.files import read_value
from tests.nas.run_tools import do_stage, finish, only, open_run, said, without_stages

LATER = ("exports", "retrain", "report")


@pytest.fixture
def searched(quick_run: Path, micro_config: Path, tmp_path: Path) -> Run:
    """A run whose search is finished and whose export is next."""
    return open_run(micro_config, without_stages(quick_run, tmp_path / "run", *LATER))


def by_loss(run: Run) -> list[Trial]:
    trials = read_trials(run.path / "search" / "trials.jsonl")
    return sorted((trial for trial in trials if trial.feasible), key=lambda trial: (trial.loss or 0, trial.number))


@contextmanager
def measuring(run: Run, factors: Mapping[str, float], others: float = 0.9) -> Iterator[list[str]]:
    """Models measure their factor (by fingerprint) of the limit on parameters; the list gets what was measured."""
    (limit,) = (line.limit for line in only(run).budget.lines if line.cost == "parameters")
    measured: list[str] = []

    def measure(model: Any, *arguments: Any) -> MeasuredCosts:
        real = measure_costs(model, *arguments)
        measured.append(model.architecture.fingerprint)
        return replace(real, costs={**real.costs, "parameters": limit * factors.get(measured[-1], others)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.nas.stages.run.measure_costs", measure)
        yield measured


def export_with(run: Run, factors: Mapping[str, float], others: float = 0.9) -> list[str]:
    """Export under ``measuring``; returns what was measured."""
    with measuring(run, factors, others) as measured:
        do_stage(run, "export")
    return measured


def finish_with(run: Run, factors: Mapping[str, float], others: float = 0.9) -> str:
    """The stages after the export under ``measuring``; returns what the terminal shows at the end."""
    with measuring(run, factors, others):
        return finish(run)


def read(run: Run, name: str) -> Any:
    return json.loads((run.path / name).read_text())


def best(run: Run) -> ExportFigures:
    return read_value(run.path / "exports" / "best-inherited" / "figures.json", ExportFigures)


# ---------------------------------------------------------------- statuses


@pytest.mark.parametrize(
    ("measured", "status"),
    [(90, "inside"), (100, "inside"), (100.1, "within tolerance"), (102.9, "within tolerance"), (103.1, "over")],
)
def test_a_line_is_kept_within_three_percent(measured, status):
    assert TOLERANCE == 0.03
    assert status_of(measured, 100) == status


def test_a_model_has_the_status_of_its_worst_line():
    for worst in range(len(STATUSES)):
        lines = [MeasuredLine("flops", "expected", None, 1, 1, 1, 1, "", status) for status in STATUSES[: worst + 1]]
        assert worst_status(lines) == STATUSES[worst]


# ---------------------------------------------------------------- the best


def test_a_best_trial_that_measures_over_is_refused_and_the_next_is_exported(searched):
    first, second, *_ = by_loss(searched)
    measured = export_with(searched, {first.architecture.fingerprint: 1.1})
    assert measured[:2] == [first.architecture.fingerprint, second.architecture.fingerprint]
    assert measured.count(first.architecture.fingerprint) == 1  # it is no member of the exported front either
    figures = best(searched)
    assert (figures.trial, figures.validation_loss) == (second.number, second.loss)
    (refused,) = figures.refused
    assert (refused.trial, refused.fingerprint) == (first.number, first.architecture.fingerprint)
    (line,) = refused.over
    assert line.name == "parameters"
    assert line.measured == pytest.approx(1.1 * line.limit)
    assert load_exports(only(searched))[0].refused == figures.refused
    assert f"trial {first.number} is refused, over the budget when measured: parameters" in said(searched)
    assert f"trial {second.number} keeps the budget" in said(searched)
    card = (searched.path / "exports" / "best-inherited" / "README.md").read_text()
    assert first.architecture.fingerprint in card
    assert "OVER" not in card

    assert compared_models(only(searched))[SEARCHED] == (second.architecture, second.loss)
    printed = finish(searched)
    sentence = f"trial {first.number} ({first.architecture.fingerprint}): {lines_text([line])}"
    assert sentence in printed
    assert sentence in (searched.path / "report" / "index.html").read_text()
    summary = read(searched, "summary.json")
    assert summary["chosen"]["fingerprint"] == second.architecture.fingerprint
    assert summary["chosen"]["refused"] == read(searched, "exports/best/figures.json")["refused"]
    assert summary["chosen"]["inherited"] == read(searched, "exports/best-inherited/figures.json")
    findings = gather(only(searched), build_summary(only(searched)))
    assert findings.models[0].architecture == second.architecture
    assert [point.architecture for point in findings.points if point.kind == "best"] == [second.architecture]
    marked = [point for point in findings.points if "over budget when its model was measured" in point.label]
    assert [point.architecture for point in marked] == [first.architecture]


def test_a_model_within_the_tolerance_is_not_refused_but_said(searched):
    first = by_loss(searched)[0]
    factors = {first.architecture.fingerprint: 1.02}
    export_with(searched, factors)
    figures = read(searched, "exports/best-inherited/figures.json")
    assert figures["trial"] == first.number
    assert figures["refused"] == []
    assert {line["name"]: line["status"] for line in figures["budget"]}["parameters"] == "within tolerance"
    assert "refused" not in said(searched)
    assert "| within tolerance |" in (searched.path / "exports" / "best-inherited" / "README.md").read_text()
    assert "within tolerance" in finish_with(searched, factors)
    page = (searched.path / "report" / "index.html").read_text()
    assert '<span class="warn">over by 2.0%</span>' in page
    assert "verdict bad" not in page


def test_where_all_are_over_the_least_excess_is_shipped_and_flagged_everywhere(searched):
    trials = by_loss(searched)
    assert len(trials) > 8
    least = trials[5]
    factors = {least.architecture.fingerprint: 1.05}
    measured = export_with(searched, factors, others=1.2)
    assert measured[:8] == [trial.architecture.fingerprint for trial in trials[:8]]
    figures = read(searched, "exports/best-inherited/figures.json")
    assert figures["trial"] == least.number
    assert [row["trial"] for row in figures["refused"]] == [t.number for t in trials[:8] if t is not least]
    assert "none of 8 candidates keeps the budget" in said(searched)
    words = "OVER BUDGET when measured on this device: parameters"
    assert words in said(searched)
    printed = finish_with(searched, factors, others=1.2)
    for name in ("best", "best-inherited"):
        assert f"**{words}" in (searched.path / "exports" / name / "README.md").read_text()
    assert words in printed
    assert "No candidate met the budget" in printed
    assert any(row.split()[:1] == ["parameters"] and row.split()[-1] == "OVER" for row in printed.splitlines())
    page = (searched.path / "report" / "index.html").read_text()
    assert f'<p class="verdict bad">{words}' in page
    assert '<span class="bad">over by 5.0%</span>' in page
    statuses = {line["name"]: line["status"] for line in read(searched, "summary.json")["budget"]}
    assert statuses["parameters"] == "over"


def test_a_model_that_is_over_only_after_training_is_flagged_and_not_blamed_on_the_candidates(searched):
    export_with(searched, {})
    printed = finish_with(searched, {}, others=1.05)
    assert "OVER BUDGET when measured on this device: parameters" in printed
    assert "No candidate met the budget" not in printed


def test_a_member_of_the_front_that_is_over_is_exported_and_flagged(searched, quick_run):
    member = json.loads((quick_run / "exports" / "exports.json").read_text())[1]
    assert member["name"] == "front-1"
    export_with(searched, {member["fingerprint"]: 1.3})
    rows = load_exports(only(searched))
    assert [row.fingerprint for row in rows][1] == member["fingerprint"]
    assert [worst_status(row.budget) for row in rows] == ["inside", "over", *["inside"] * (len(rows) - 2)]
    assert "front-1 (trial" in said(searched)
    assert "**OVER BUDGET" in (searched.path / "exports" / "front-1" / "README.md").read_text()
    finish(searched)
    assert '<span class="bad">parameters over by 30.0%</span>' in (searched.path / "report" / "index.html").read_text()


def test_another_choice_is_another_input_of_what_comes_after(quick_run, micro_config, tmp_path):
    run = open_run(micro_config, without_stages(quick_run, tmp_path / "run", "exports"))
    export_with(run, {by_loss(run)[0].architecture.fingerprint: 1.1})
    assert not only(run).folder("retrain").complete
    same = open_run(micro_config, without_stages(quick_run, tmp_path / "same", "exports"))
    do_stage(same, "export")
    assert only(same).folder("retrain").complete


# ---------------------------------------------------------------- the model that was judged


def test_the_best_is_the_model_that_the_verdict_is_about(quick_run, micro_config):
    run = open_run(micro_config, quick_run)
    result = load_results(only(run))[0]
    folder = quick_run / "exports" / "best"
    figures = read_value(folder / "figures.json", ExportFigures)
    inherited = best(run)
    assert figures.loss == result.loss != inherited.loss
    assert figures.inherited is not None
    assert figures.inherited.loss == inherited.loss
    assert figures.measured == result.measured
    judged = run.judge("test", run.config.retrain.evaluation_windows, moesaic.load(folder))
    assert judged(result.architecture).loss == pytest.approx(result.loss, rel=1e-6)
    card = (folder / "README.md").read_text()
    assert (
        f"trained from scratch for {result.steps} steps with seed 0. Their loss (nats per token) on the test split: "
        in card
    )
    assert f"{result.loss:.4f} (standard error" in card
    assert f"as in the search, it is {inherited.loss:.4f}" in card
    other = (quick_run / "exports" / "best-inherited" / "README.md").read_text()
    assert f"{inherited.loss:.4f} (standard error" in other
    assert f"{result.loss:.4f}" not in other
    assert "Trained alone, as in `best`" in other
    names = [{path.name for path in (quick_run / "exports" / name).iterdir()} for name in ("best", "best-inherited")]
    assert names[0] == names[1]
    page = (quick_run / "report" / "index.html").read_text()
    assert f"as in the search, the searched model has a test loss of {inherited.loss:.4f}" in page
    assert read(run, "summary.json")["exports"][:2] == ["best", "best-inherited"]


def test_every_training_loads_as_the_model_that_was_judged(quick_run, micro_config):
    run = open_run(micro_config, quick_run)
    for result in load_results(only(run)):
        for one in result.runs:
            folder = quick_run / "retrain" / result.name / f"seed-{one.seed}"
            model = moesaic.load(str(folder))
            assert model.architecture.fingerprint == one.fingerprint
            judge = run.judge("test", run.config.retrain.evaluation_windows, model)
            assert judge(model.architecture).loss == pytest.approx(one.loss, rel=1e-6)
            assert (folder / "tokenizer.json").read_bytes() == run.task.tokenizer.read_bytes()


def test_what_a_user_made_of_the_best_is_kept_when_it_is_trained_again(quick_run, micro_config, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(quick_run, path)
    (path / "exports" / "best" / "notes.txt").write_text("mine")
    run = open_run(micro_config, path, "retrain.steps=5")
    do_stage(run, "retrain")
    assert (path / "previous" / "exports-best-1" / "notes.txt").read_text() == "mine"
    assert "for 5 steps" in read_value(path / "exports" / "best" / "figures.json", ExportFigures).weights


# ---------------------------------------------------------------- latency is measured again


@pytest.fixture(scope="module")
def predictor(quick_run, micro_config):
    run = open_run(micro_config, quick_run)
    return calibrate(run.space, run.context, run.config.latency, run.device, seed=0).predictor


@pytest.mark.parametrize(
    ("timed", "held", "status"),
    [
        ([9.0], 9.0, "inside"),
        ([10.2], 10.2, "within tolerance"),
        ([11.0, 9.9, 10.1], 10.1, "within tolerance"),
        ([11.0, 10.9, 8.0], 10.9, "over"),
    ],
)
def test_a_latency_over_its_budget_is_measured_twice_more(
    quick_run, micro_config, predictor, monkeypatch, timed, held, status
):
    run = open_run(micro_config, quick_run)
    part = only(run)
    run.__dict__["pricer"] = replace(run.pricer, predictor=predictor)
    part.__dict__["budget"] = Budget((BudgetLine("latency", 10.0, "expected", confidence=0.9),), run.pricer)
    left = list(timed)
    monkeypatch.setattr("moesaic.nas.costs.measure.time_pass", lambda *_: AnchoredTiming(7.0, left.pop(0), 0.7, 0.01))
    architecture = by_loss(run)[0].architecture
    judge = run.judge("test", 4, run.supernet.extract(architecture).eval())
    measured = part.measure(judge.model, judge(architecture).loads, judge.batch)
    assert left == []
    assert measured.costs["latency"] == measured.latency.corrected_ms == held
    (line,) = part.measured_lines(architecture, measured.costs)
    assert (line.status, line.confidence) == (status, 0.9)


@pytest.fixture
def unfinished(quick_run: Path, micro_config: Path, tmp_path: Path) -> Run:
    """A run that was killed at the end of its export."""
    run = open_run(micro_config, without_stages(quick_run, tmp_path / "run"))
    for file in ("artifact.json", "exports.json"):
        (run.path / "exports" / file).unlink()
    return run


def test_an_export_that_is_written_again_keeps_what_a_person_put_beside_it(unfinished):
    best = unfinished.path / "exports" / INHERITED_BEST
    (best / "notes.txt").write_text("mine")
    (best / "retrained").mkdir()
    (best / "retrained" / "result.json").write_text("{}")
    card = (best / "README.md").stat().st_ino
    do_stage(unfinished, "export")
    assert (best / "README.md").stat().st_ino != card
    assert (best / "notes.txt").read_text() == "mine"
    assert (best / "retrained" / "result.json").read_text() == "{}"
    assert not list((unfinished.path / "exports").glob(".*"))


def test_a_folder_of_a_person_in_the_place_of_an_export_is_refused(unfinished):
    best = unfinished.path / "exports" / INHERITED_BEST
    shutil.rmtree(best)
    best.mkdir()
    (best / "README.md").write_text("mine")
    with pytest.raises(MoesaicError, match="is not an exported model, and stays"):
        do_stage(unfinished, "export")
    assert [(path.name, path.read_text()) for path in best.iterdir()] == [("README.md", "mine")]
