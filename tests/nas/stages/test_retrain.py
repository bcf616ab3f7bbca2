"""Retraining with several seeds: means, intervals, pairs, what is kept, and what the verdict makes of it."""

from __future__ import annotations

import shlex
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from scipy import stats

from moesaic.nas.config import load_config
from moesaic.nas.exports.figures import RetrainedModel
from moesaic.nas.report.summary import Summary, costs_sentence, verdict
from moesaic.nas.stages.retrain_export import RetrainedExport, retrain_export
from moesaic.nas.stages.retrain_models import load_results
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.write_report import load_summary
from moesaic.nas.terminal.progress import Reporter
from moesaic.nas.trust.scores import Difference, MeanScores, SeedRun
from moesaic.search_spaces import Interrupted
from moesaic.search_spaces.files import read_value
from moesaic.supernet import Judge, LayerLoad
from tests.nas.run_tools import QUICK, do_stage, finish, only, open_run, without_stages

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


def judged(mean: float, p_value: float, seeds: int, steps: int = 10, **costs: float) -> str:
    """The verdict on a searched model beside a near rival and one that is far behind."""
    above = Difference(mean, 0.1, mean - 0.05, mean + 0.05, p_value, seeds)
    measured = {"flops": 1e6, "latency": 8.0, "parameters": 5e5}
    far = SimpleNamespace(name="dense", loss=3.9, above_searched=replace(above, p_value=1e-9), measured=measured)
    near = SimpleNamespace(name="uniform", loss=3.2, above_searched=above, measured={**measured, **costs})
    mine = SimpleNamespace(loss=3.0, steps=steps, measured={"flops": 9e5, "latency": 10.0, "parameters": 8.5e5})
    chosen, more = SimpleNamespace(retrained=mine), "moesaic run 'my run.yaml' retrain.seeds=3 --out runs/x"
    return verdict(cast(Summary, SimpleNamespace(chosen=chosen, rivals=(far, near), more_seeds=more)))


@pytest.mark.parametrize(
    ("mean", "p_value", "words"),
    [
        (0.06, 0.049, "The search paid"),
        (-0.06, 0.001, "The search did not pay"),
        (0.06, 0.051, "The search made no significant difference"),
    ],
)
def test_the_verdict_over_several_seeds_is_that_of_a_test(mean, p_value, words):
    text = judged(mean, p_value, 3)
    assert text.startswith(words)
    assert "best rival (uniform)" in text
    assert f"{mean - 0.05:+.4f} to {mean + 0.05:+.4f} over 3 training seeds and the test sequences" in text
    assert "Holm-corrected for 2 rivals" in text


def test_models_that_were_not_trained_are_judged_over_sequences() -> None:
    text = judged(0.06, 0.01, seeds=1, steps=0)
    assert text.startswith("The search paid: test loss 3.0000 against 3.2000 of the best rival (uniform)")
    assert "over the test sequences, in pairs; p = 0.010 (Holm-corrected for 2 rivals)" in text
    assert judged(0.06, 0.2, seeds=1, steps=0).startswith("The search made no significant difference")


@pytest.mark.parametrize("p_value", [1e-12, 0.5])
def test_one_seed_gives_no_verdict_but_the_command_for_one(p_value):
    text = judged(0.06, p_value, 1)
    assert text.startswith("One training seed gives no verdict")
    assert "paid" not in text
    assert "+0.0100 to +0.1100 is over test sequences alone" in text
    assert text.endswith("`moesaic run 'my run.yaml' retrain.seeds=3 --out runs/x`")


def test_a_verdict_is_corrected_for_the_number_of_rivals():
    """Two rivals, each at 4 %: by chance one of two is below 5 % nearly twice as often as one."""
    above = Difference(-0.1, 0.02, -0.19, -0.01, 0.04, 3)
    costs = {"flops": 1.0, "parameters": 1.0}
    rivals = tuple(
        SimpleNamespace(name=name, loss=2.9 + n, above_searched=above, measured=costs) for n, name in enumerate("ab")
    )
    chosen = SimpleNamespace(retrained=SimpleNamespace(loss=3.0, steps=10, measured=costs))
    both = verdict(cast(Summary, SimpleNamespace(chosen=chosen, rivals=rivals)))
    alone = verdict(cast(Summary, SimpleNamespace(chosen=chosen, rivals=rivals[:1])))
    assert both.startswith("The search made no significant difference")
    assert "p = 0.080" in both
    assert alone.startswith("The search did not pay")


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_verdict_says_what_the_model_costs_beside_its_rival(seeds):
    assert "has 1.25 times the latency, 1.70 times the parameters and 0.90 times the FLOPs" in judged(0.1, 0.01, seeds)
    untimed = SimpleNamespace(measured={"flops": 2.0, "parameters": 3.0})
    rival = SimpleNamespace(measured={"flops": 1.0, "parameters": 2.0, "latency": 1.0})
    text = costs_sentence(cast(RetrainedModel, untimed), cast(RetrainedModel, rival))
    assert text == "The searched model has 1.50 times the parameters and 2.00 times the FLOPs of that rival."


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


def test_one_seed_has_no_interval_and_no_verdict_and_the_command_it_names_gives_one(quick_run, micro_config):
    run = open_run(micro_config, quick_run)
    assert all(result.interval is None and len(result.runs) == 1 for result in results(run))
    page = (quick_run / "report" / "index.html").read_text()
    assert "One training seed gives no verdict" in page
    program, stage, file, *rest = shlex.split(load_summary(only(run)).more_seeds)
    assert (program, stage, file) == ("moesaic", "run", str(micro_config))
    assert rest == [*QUICK, "retrain.seeds=3", "--out", str(quick_run)]
    assert load_config(file, rest[:-2]).config.retrain.seeds == 3


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
