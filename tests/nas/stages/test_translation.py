"""A run of models that translate, from files to a report: what it keeps, scores, resumes, retrains and refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import moesaic
from moesaic.nas.config import TrainConfig, load_config
from moesaic.nas.exports.folder import load_exported
from moesaic.nas.stages.check_fidelity import load_trust
from moesaic.nas.stages.retrain_export import retrain_export
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.run_search import load_search
from moesaic.nas.stages.stage import BY_NAME
from moesaic.nas.terminal.progress import Reporter
from moesaic.nas.training.recipe import supernet_recipe
from moesaic.nas.training.trainer import Trainer
from moesaic.search_spaces import MoesaicError
from tests.nas.data.pair_tools import write_corpus
from tests.nas.run_tools import finish, open_run, said

LAYER = "heads: [1, 2], experts: [1, 2], dense_sizes: [32], expert_sizes: [16, 32], routers: [{kind: top_k, k: [1]}]"
RUN = f"""\
name: translating
data: {{kind: parallel, files: FILES, vocabulary: separate, vocab_size: 450, sequence_length: 24}}
space:
  name: toy
  backbone: {{head_size: 16, positions: sinusoidal}}
  encoder: {{width: [32, 48], depth: [1, 2], layer: {{{LAYER}}}}}
  width: [32]
  depth: [1, 2]
  layer: {{{LAYER}, cross: {{heads: [1, 2]}}}}
budget: {{flops: 75%}}
device: {{device: cpu, threads: 1}}
supernet: {{batch_size: 8, label_smoothing: 0.1, dropout: 0.1}}
search: {{population: 8, evaluation_windows: 8}}
retrain: {{batch_size: 8, evaluation_windows: 6}}
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translating")
    path = folder / "run.yaml"
    path.write_text(RUN.replace("FILES", json.dumps(write_corpus(folder / "text", 200))))
    return path


@pytest.fixture(scope="module")
def finished(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    run = open_run(config_file, path, "search.trials=10", "export.front=1")
    shown = finish(run)
    assert "data: pairs: 200 train, 40 validation, 40 test" in said(run)
    assert "BLEU" in shown and "chrF" in shown and "nats per" in shown
    return path


def test_every_model_has_its_scores_and_how_they_were_made(finished: Path) -> None:
    results = json.loads((finished / "retrain" / "results.json").read_text())
    exports = [json.loads(path.read_text()) for path in (finished / "exports").glob("*/figures.json")]
    assert len(results) == 3 and len(exports) >= 2
    for model in (*results, *results[0]["runs"], *exports):
        assert {"perplexity", "bleu", "chrf"} <= model["metrics"].keys()
        assert model["signature"].startswith("beam 4, length penalty 0.6; BLEU nrefs:1|")
    card = (finished / "exports" / "best" / "README.md").read_text()
    assert "BLEU" in card and results[0]["signature"] in card


def test_an_export_is_the_slice_and_translates(finished: Path) -> None:
    figures = json.loads((finished / "exports" / "best-inherited" / "figures.json").read_text())
    assert figures["slice_max_logit_difference"] < 1e-4
    assert figures["reload_max_logit_difference"] < 1e-5
    model = load_exported(finished / "exports" / "best")
    assert model.source_vocab_size is not None and (finished / "exports" / "best" / "source_tokenizer.json").exists()
    assert len(list(moesaic.translate(finished / "exports" / "best", ["a cat", "", "the dog runs"]))) == 3


def test_an_export_is_retrained_with_its_own_vocabularies(finished: Path, tmp_path: Path) -> None:
    folder = finished / "exports" / "best"
    reporter = Reporter(Console(file=io.StringIO()))
    result, metrics = retrain_export(folder, ["retrain.steps=2"], reporter, lambda: False)
    assert [metric.name for metric in metrics] == ["perplexity", "bleu", "chrf"]
    assert {metric.name for metric in metrics} == result.metrics.keys() and "sacrebleu" not in result.name
    with pytest.raises(MoesaicError, match="a model with an encoder and a decoder translates"):
        retrain_export(folder, ["data={kind: stdlib}"], reporter, lambda: False)


def test_a_finished_run_has_nothing_left_to_do(finished: Path, config_file: Path) -> None:
    weights = finished / "supernet" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    finish(open_run(config_file, finished, "search.trials=10", "export.front=1"))
    assert weights.stat().st_mtime_ns == before


def test_two_workers_train_as_one_does(config_file: Path, tmp_path: Path) -> None:
    """Batches have different numbers of rows, all of them even; without dropout, whose draws are those of a worker."""
    settings = ("dropout=0", "balance_weight=0.0", "steps=5", "warmup_steps=1")
    run = open_run(config_file, tmp_path / "run", *(f"supernet.{setting}" for setting in settings))
    recipe = supernet_recipe(run.config, run.space, bfloat16=False)
    assert len({len(run.task.batch(8, 0, step)) for step in range(5)}) > 1
    losses = [
        run.judge("validation", 8, Trainer(run.task, run.device, TrainConfig(workers=workers)).train(
            recipe, tmp_path / str(workers), "same"))(run.space.largest).loss
        for workers in (1, 2)
    ]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


OF_PARALLEL = {
    "data.vocabulary=shared": {"supernet", "latency"},
    "latency.beam=2": {"latency"},
    "latency.source_length=12": {"latency"},
}


@pytest.mark.parametrize("setting", OF_PARALLEL)
def test_a_setting_of_translations_is_an_input_of_the_stages_that_it_decides(
    setting: str, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "needs_latency", True)
    before, after = (
        {name: open_run(config_file, tmp_path, *chosen).folder(name).inputs for name in ("supernet", "latency")}
        for chosen in (("latency.phase=translate",), ("latency.phase=translate", setting))
    )
    assert {name for name in before if before[name] != after[name]} == OF_PARALLEL[setting]


def test_the_judge_decides_the_search(config_file: Path, tmp_path: Path) -> None:
    loss, bleu = (
        BY_NAME["search"].inputs(open_run(config_file, tmp_path, f"search.judge={j}")) for j in ("loss", "bleu")
    )
    assert loss != bleu


def test_a_search_by_bleu_inside_two_budgets_with_its_check(config_file: Path, tmp_path: Path) -> None:
    """One budget is of measured translations."""
    run = open_run(
        config_file, tmp_path / "run", "search.judge=bleu", "search.trials=8", "search.population=4",
        "budget=null", "budgets={few: {flops: 70%}, fast: {latency: 80%}}", "retrain.rivals=false",
        "latency.models=8", "latency.repeats=3", "latency.beam=2", "latency.batch_size=1",
        "latency.sequence_length=6", "fidelity={check: 4, steps: 2}", "export.front=0", "retrain.steps=2",
    )  # fmt: skip
    finish(run)
    for part in run.budgets:
        trials, result = load_search(part)
        assert -0.5 < (result.best.loss or 0) < 1.5
        best = run.judge("validation", run.config.search.evaluation_windows)(result.best.architecture)
        assert best.loss == pytest.approx(result.best.loss)
        trust = load_trust(part)
        assert trust.check is not None and len(trust.check.members) == 4
        page = (part.path / "report" / "index.html").read_text()
        assert "inherited validation loss, 1 - BLEU" in page and "nats per target token" in page
        assert trials
    assert run.context.phase == "translate"
    assert run.predictor is not None and run.predictor.accuracy.count >= 2


WRONG = {
    "judge": (["data={kind: stdlib}", "space=tiny", "search.judge=bleu"], "BLEU is of translations", "search.judge"),
    "decode": (["latency.phase=decode"], "a step of a model with an encoder is part of a translation", "latency.phase"),
    "one": (["latency.sequence_length=1"], "a translation has a word and an end", "latency.sequence_length"),
    "translate": (
        ["data={kind: stdlib}", "space=tiny", "latency.phase=translate"],
        "does not translate",
        "latency.phase",
    ),
    "beam": (
        ["data={kind: stdlib}", "space=tiny", "latency.beam=2"],
        "beam is of models that translate",
        "latency.beam",
    ),
    "text": (["data={kind: stdlib}"], "a model with an encoder and a decoder translates", "data.kind"),
    "decoder": (["space=tiny"], "parallel text is for a model that translates", "data.kind"),
    "questions": (["questions=q.jsonl"], "a model that translates answers no questions", ""),
    "model": (["model={from: DIR}"], "a run that starts from a trained model learns from text", ""),
    "workers": (["train.workers=3"], "workers must divide the batch size", "train.workers"),
    "many": (["train.workers=16", "supernet.batch_size=16", "retrain.batch_size=16"], "workers must divide", ""),
    "smoothing": (["supernet.label_smoothing=1"], "less than 1", "supernet.label_smoothing"),
    "dropout": (["retrain.dropout=-0.1"], "greater than or equal to 0", "retrain.dropout"),
    "three": (["data.files={train: [a, b, c]}"], "the train split is not two files", "data"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_message(name: str, config_file: Path) -> None:
    overrides, message, where = WRONG[name]
    with pytest.raises(MoesaicError, match=message) as caught:
        load_config(config_file, overrides)
    assert where in str(caught.value.where)
