"""Retraining with several seeds: means, intervals, pairs, what is kept, and what the verdict makes of it."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from scipy import stats

from moesaic.nas.exports.figures import RetrainedModel
from moesaic.nas.report.summary import Summary, verdict
from moesaic.nas.stages.retrain_export import RetrainedExport, retrain_export
from moesaic.nas.stages.retrain_models import load_results
from moesaic.nas.stages.run import Run
from moesaic.nas.terminal.progress import Reporter
from moesaic.nas.trust.scores import Difference, MeanScores, SeedRun, difference_over_seeds, paired_difference
from moesaic.search_spaces import Interrupted
from moesaic.search_spaces.files import read_value
from moesaic.supernet import Evaluation, Judge, LayerLoad
from tests.nas.run_tools import do_stage, finish, only, open_run, without_stages

SEEDS = ("retrain.seeds=2", "seed=0")


@pytest.fixture(scope="module")
def two_seeds(quick_run: Path, micro_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A finished run with two seeds, and what the terminal shows at its end."""
    path = without_stages(quick_run, tmp_path_factory.mktemp("seeds") / "run", "retrain", "report")
    run = open_run(micro_config, path, *SEEDS)
    return run, finish(run)


def results(run: Run) -> list[RetrainedModel]:
    return load_results(only(run))


def losses(run: Run) -> list[list[float]]:
    return [[one.loss for one in result.runs] for result in results(run)]


def evaluation(*sequence_losses: float) -> Evaluation:
    return Evaluation(float(np.mean(sequence_losses)), 0.1, 100, (), sequence_losses)


# ---------------------------------------------------------------- figures


def test_figures_are_means_over_seeds_with_students_interval():
    runs = tuple(
        SeedRun(loss=loss, standard_error=0.1, metrics={"bits": 2 * loss}, tokens=64, seed=seed, fingerprint="a")
        for seed, loss in enumerate((3.0, 3.1, 3.3))
    )
    found = MeanScores.over(runs)
    assert found.loss == pytest.approx(3.1333, abs=1e-4)
    assert found.metrics == pytest.approx({"bits": 2 * found.loss})
    interval = stats.t.interval(0.95, 2, loc=found.loss, scale=stats.sem([3.0, 3.1, 3.3]))
    assert found.interval == pytest.approx(interval)
    assert found.half_interval == found.error == pytest.approx((interval[1] - interval[0]) / 2)
    assert found.runs == runs
    one = MeanScores.over(runs[:1])
    assert (one.loss, one.interval, one.half_interval, one.error) == (3.0, None, None, 0.1)


def test_one_seed_is_compared_over_sequences_and_several_seed_by_seed():
    mine, other = evaluation(3.0, 4.0, 5.0), evaluation(2.9, 3.8, 4.7)
    one = difference_over_seeds([mine], [other])
    assert one == paired_difference(mine, other)
    assert one.seeds == 1
    interval = stats.t.interval(0.95, 2, loc=0.2, scale=stats.sem([0.1, 0.2, 0.3]))
    assert (one.mean, one.low, one.high) == pytest.approx((0.2, *interval))
    several = difference_over_seeds([mine, evaluation(3.5, 3.9)], [other, evaluation(3.6, 3.7)])
    interval = stats.t.interval(0.95, 1, loc=0.125, scale=stats.sem([0.2, 0.05]))
    assert (several.mean, several.low, several.high) == pytest.approx((0.125, *interval))
    assert several.seeds == 2


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.001, 0.1, "The search paid"),
        (-0.1, -0.001, "The search did not pay"),
        (-0.001, 0.1, "The search made no significant difference"),
        (0.0, 0.1, "The search made no significant difference"),
    ],
)
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_verdict_says_no_difference_exactly_where_the_interval_holds_zero(low, high, words, seeds):
    above = Difference((low + high) / 2, 0.1, low, high, seeds)
    worse = SimpleNamespace(name="dense", loss=3.9, above_searched=replace(above, low=5.0, high=6.0))
    rivals = [worse, SimpleNamespace(name="uniform", loss=3.2, above_searched=above)]
    chosen = SimpleNamespace(retrained=SimpleNamespace(loss=3.0))
    text = verdict(cast(Summary, SimpleNamespace(chosen=chosen, rivals=rivals)))
    assert text.startswith(words)
    assert "best rival (uniform)" in text
    assert f"{low:+.4f} to {high:+.4f}" in text
    assert ("one training seed" if seeds == 1 else "3 training seeds") in text


# ---------------------------------------------------------------- runs


def test_every_model_is_trained_with_every_seed(two_seeds):
    run, _ = two_seeds
    for result in results(run):
        assert [one.seed for one in result.runs] == [0, 1]
        assert result.loss == pytest.approx(np.mean([one.loss for one in result.runs]))
        assert result.runs[0].loss != result.runs[1].loss
        assert result.interval is not None
        assert result.interval[0] < result.loss < result.interval[1]
        assert result.above_searched.seeds == 2
        for seed in (0, 1):
            folder = run.path / "retrain" / result.name / f"seed-{seed}"
            assert {"model.safetensors", "metrics.jsonl", "architecture.yaml"} <= {p.name for p in folder.iterdir()}
    searched, *rivals = results(run)
    assert len(rivals) == 2
    for rival in rivals:
        pairs = [a.loss - b.loss for a, b in zip(rival.runs, searched.runs, strict=True)]
        assert rival.above_searched.mean == pytest.approx(np.mean(pairs))


def test_tables_show_means_with_half_their_interval(two_seeds):
    run, printed = two_seeds
    page = (run.path / "report" / "index.html").read_text()
    for result in results(run):
        text = f"{result.loss:.4f} ± {result.half_interval:.4f}"
        assert text in printed
        assert f"<td>{text}</td>" in page
    for text in (printed, page):
        assert "2 training seeds" in text
    assert "once with each of 2 seeds" in page


def test_one_seed_has_no_interval_and_its_verdict_says_so(quick_run, micro_config):
    run = open_run(micro_config, quick_run)
    assert all(result.interval is None and len(result.runs) == 1 for result in results(run))
    assert "one training seed" in (quick_run / "report" / "index.html").read_text()


def test_more_seeds_keep_what_is_trained(two_seeds, quick_run, micro_config, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(quick_run, path)
    before = {p: p.stat().st_mtime_ns for p in (path / "retrain").rglob("seed-0/model.safetensors")}
    assert len(before) == 3
    run = open_run(micro_config, path, *SEEDS)
    do_stage(run, "retrain")
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert losses(run) == losses(two_seeds[0])


def test_a_run_stopped_in_its_second_seed_ends_as_one_that_was_not(two_seeds, quick_run, micro_config, tmp_path):
    path = without_stages(quick_run, tmp_path / "run", "retrain", "report")
    checkpoint = path / "retrain" / "searched" / "seed-1" / "checkpoint.safetensors"
    with pytest.raises(Interrupted):
        do_stage(open_run(micro_config, path, *SEEDS, should_stop=checkpoint.exists), "retrain")
    assert checkpoint.exists()
    first = path / "retrain" / "searched" / "seed-0" / "model.safetensors"
    written = first.stat().st_mtime_ns
    run = open_run(micro_config, path, *SEEDS)
    do_stage(run, "retrain")
    assert first.stat().st_mtime_ns == written
    assert losses(run) == losses(two_seeds[0])


def test_a_second_seed_over_the_budget_is_flagged(quick_run, micro_config, tmp_path, monkeypatch):
    """Its experts get more tokens than any router sends; the first seed's model is inside."""

    judged = Counter()

    def overloaded(judge, architecture):
        found = judge_alone(judge, architecture)
        judged[architecture] += 1
        if judged[architecture] == 1:
            return found
        everything = [load and LayerLoad((4.0,) * len(load.pairs_per_token)) for load in found.loads]
        return replace(found, loads=tuple(everything))

    judge_alone = Judge.__call__
    monkeypatch.setattr(Judge, "__call__", overloaded)
    monkeypatch.setattr(
        "moesaic.nas.stages.retrain_models.lower_thresholds_to_fit", lambda judge, budget: judge.model.architecture
    )
    run = open_run(micro_config, without_stages(quick_run, tmp_path / "run", "retrain", "report"), *SEEDS)
    printed = finish(run)
    uniform = next(result for result in results(run) if result.name == "uniform")
    line = next(line for line in uniform.budget if line.name == "flops")
    assert uniform.measured["flops"] <= line.limit
    assert line.status == "over"
    assert line.measured > line.limit
    (row,) = (row for row in printed.splitlines() if row.split()[:1] == ["uniform"])
    assert "OVER flops" in row


def test_an_export_is_trained_with_every_seed(quick_run, tmp_path):
    export = tmp_path / "best"
    shutil.copytree(quick_run / "exports" / "best", export)
    arguments = (["retrain.steps=4", "retrain.seeds=3", "seed=5"], Reporter(), lambda: False)
    result, metrics = retrain_export(export, *arguments)
    assert [one.seed for one in result.runs] == [5, 6, 7]
    assert result.interval is not None
    assert result.interval[0] < result.loss < result.interval[1]
    assert {metric.name for metric in metrics} == set(result.metrics)
    assert read_value(export / "retrained" / "result.json", RetrainedExport) == result
    weights = [export / "retrained" / f"seed-{seed}" / "model.safetensors" for seed in (5, 6, 7)]
    written = [path.stat().st_mtime_ns for path in weights]
    assert retrain_export(export, *arguments)[0] == result
    assert [path.stat().st_mtime_ns for path in weights] == written
