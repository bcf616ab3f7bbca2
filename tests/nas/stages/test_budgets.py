"""Several budgets in one run: one supernet and one search, and for each its own models and report."""

import json

import pytest

from moesaic.nas.search.trials import read_trials
from moesaic.nas.stages.run_search import load_search
from moesaic.search_spaces import MoesaicError
from tests.nas.command import moesaic
from tests.nas.run_tools import QUICK, finish, open_run, said

TWO = ("budget={}", "budgets={phone: {flops: 60%}, server: {flops: 90%, parameters: 90%}}")


@pytest.fixture(scope="module")
def two_budgets(micro_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "run"
    run = open_run(micro_config, path, *TWO)
    return run, finish(run)


def test_each_budget_gets_its_front_models_and_report(two_budgets):
    run, shown = two_budgets
    trials = read_trials(run.path / "search" / "trials.jsonl")
    evaluated = [t.architecture for t in trials if t.ended]
    assert len(evaluated) == len(set(evaluated)) == 48, "24 for each, none twice"
    fronts = {}
    for part in run.budgets:
        fronts[part.name] = load_search(part)[1]
        assert all(part.budget.fits(t.architecture) for t in fronts[part.name].front)
        summary = json.loads((part.path / "summary.json").read_text())
        assert [line["name"] for line in summary["budget"]] == list(part.limits)
        assert (part.path / "report" / "index.html").exists()
        assert (part.path / "exports" / "best" / "model.safetensors").exists()
        assert (run.path / "search" / part.name / "pareto.csv").exists()
    assert fronts["server"].best.loss <= fronts["phone"].best.loss
    assert not (run.path / "budgets" / "phone" / "supernet").exists()
    assert said(run).count("supernet: done") == 1
    assert shown.count("Budget") >= 2


def test_a_budget_that_is_added_costs_its_own_evaluations_alone(two_budgets, micro_config):
    run, _ = two_budgets
    before = (run.path / "search" / "trials.jsonl").read_text()
    more = "budgets={phone: {flops: 60%}, server: {flops: 90%, parameters: 90%}, watch: {flops: 50%}}"
    again = open_run(micro_config, run.path, TWO[0], more)
    finish(again)
    after = (run.path / "search" / "trials.jsonl").read_text()
    assert after.startswith(before)
    assert sum(t.ended for t in read_trials(run.path / "search" / "trials.jsonl")) == 72
    assert "supernet: complete, skipped" in said(again)
    assert "search: continues" in said(again)
    assert (run.path / "budgets" / "watch" / "report" / "index.html").exists()


def test_an_impossible_one_of_several_is_told_before_training(micro_config, tmp_path):
    run = open_run(micro_config, tmp_path / "run", "budget={}", "budgets={a: {flops: 60%}, b: {flops: 1 FLOPs}}")
    with pytest.raises(MoesaicError, match="no architecture of space tiny meets the budget"):
        finish(run)
    assert not (tmp_path / "run" / "supernet").exists()


def test_a_plan_shows_every_budget(micro_config):
    shown = moesaic("plan", micro_config, *QUICK, *TWO)
    assert shown.returncode == 0, shown.stderr
    assert "budget phone" in shown.stdout and "budget server" in shown.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budgets={a: {flops: 60%}}"], "one budget, or several"),
        (["budget={}", "budgets={a: {}}"], "at least one line"),
        (["budget={}", "budgets={a/b: {flops: 60%}}"], "a/b"),
        (["budget={}", "budgets={a: {flop: 60%}}"], "nearest: +flops"),
        (["budget={}"], "at least one line"),
    ],
)
def test_wrong_budgets_are_told(micro_config, tmp_path, overrides, message):
    with pytest.raises(MoesaicError, match=message):
        open_run(micro_config, tmp_path, *overrides)
