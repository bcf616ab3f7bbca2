"""A run from an encoder: BERT with its head is judged by masked tokens, one without a head by its states."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from moesaic.nas.config import DataConfig, load_config
from moesaic.nas.data import load_corpus
from moesaic.nas.data.tokenizer import train_tokenizer
from moesaic.nas.exports.folder import load_exported
from moesaic.nas.stages.retrain_export import retrain_export
from moesaic.nas.stages.retrain_models import load_results
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.run_search import load_search
from moesaic.nas.stages.write_report import load_summary
from moesaic.nas.tasks import MaskedTokens, SameStates
from moesaic.nas.terminal.progress import Reporter
from moesaic.search_spaces import MoesaicError
from moesaic.supernet import Judge, TrainData, TrainSettings, evaluate, train
from moesaic.supernet.convert import open_checkpoint, write_folder
from tests.nas.run_tools import finish, only, said
from tests.nas.run_tools import open_run as open_quick_run

CONFIG = """\
name: encoder
data: {{kind: text, files: ['{files}'], sequence_length: 32}}
model: {{from: '{model}', calibration_windows: 16}}
space: {{preset: from-model, expert_sizes: [16, 32], shared: [0.25, 0.5], active: [0.25, 0.5], kept: [0.25, 0.5, 0.75]}}
budget: {{flops: 80%}}
device: {{device: cpu, threads: 1}}
search: {{trials: 6, evaluation_windows: 8}}
export: {{front: 1}}
retrain: {{repair_windows: 16, evaluation_windows: 8}}
"""
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
         "max_position_embeddings": 32, "vocab_size": 303}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a small BERT of transformers, with its ``masked`` head trained for seconds, or without a head."""
    made: dict[str, Path] = {}

    def make(head: str) -> Path:
        if head not in made:
            folder = tmp_path_factory.mktemp("encoder") / head
            torch.manual_seed(0)
            kind = transformers.BertForMaskedLM if head == "masked" else transformers.BertModel
            model = kind(transformers.BertConfig(**SIZES))
            with torch.no_grad():
                for parameter in model.parameters():  # large enough to matter
                    parameter.add_(torch.randn_like(parameter) * (0.2 if head == "none" else 0.0))
            model.save_pretrained(folder)
            tokenizer = train_tokenizer([path.read_text() for path in sorted(corpus_folder.rglob("*.txt"))], 300)
            tokenizer.add_special_tokens(["[CLS]", "[SEP]", "[MASK]"])
            tokenizer.save(str(folder / "tokenizer.json"))
            if head == "masked":
                train_in_place(folder, corpus_folder)
            made[head] = folder
        return made[head]

    return make


def train_in_place(folder: Path, corpus_folder: Path) -> None:
    data = DataConfig(kind="text", files=[str(corpus_folder)], sequence_length=32)
    task = MaskedTokens(load_corpus(data, "data", tokenizer=folder / "tokenizer.json"))
    model = open_checkpoint(folder).load()
    steps = TrainData(lambda step: task.batch(16, 0, step), lambda step: [model.architecture])
    train(model, steps, TrainSettings(120, 5e-3, 5), folder.parent / "training", "bert")
    write_folder(model, folder, "bert")


def open_run(folder: Path, model: Path, files: Path, *overrides: str) -> Run:
    path = folder / "encoder.yaml"
    path.write_text(CONFIG.format(files=files, model=model))
    run = open_quick_run(path, folder / "run")
    run.loaded = load_config(path, overrides)
    return run


@pytest.mark.parametrize("head", ["masked", "none"])
def test_from_a_folder_to_a_sparse_export_that_loads(
    head: str, encoder: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(encoder(head)).load()
    run = open_run(tmp_path, encoder(head), corpus_folder)
    shown = finish(run)
    part = only(run)
    assert type(run.task) is (MaskedTokens if head == "masked" else SameStates)
    batch = run.task.held_out("test", 8)
    with torch.no_grad():
        expected = source(batch.tokens)
        torch.testing.assert_close(run.supernet(batch.tokens, run.space.largest), expected, atol=1e-4, rtol=1e-4)
    trials, result = load_search(part)
    assert result.best.costs["flops"] <= part.budget.lines[0].limit
    assert all(trial.engine["puzzle"]["role"] == "solution" for trial in trials)

    searched, *rivals = load_results(part)
    assert rivals
    folder = part.folder("export").path / "best"
    exported = load_exported(folder)
    assert evaluate(exported, batch, loss=run.task.loss).loss == pytest.approx(searched.loss, abs=1e-4)
    assert open_checkpoint(folder).architecture == exported.architecture  # a model to start from, too
    again = load_config(tmp_path / "encoder.yaml", [f"model.from={folder}"])
    assert again.space.backbone.head == head

    # Everything says what the loss is.
    unit = run.task.unit
    assert load_summary(part).unit == unit
    card, page = (folder / "README.md").read_text(), (part.folder("report").path / "index.html").read_text()
    assert f"Their loss ({unit}) on the test split: {searched.loss:.4f}" in card
    assert f"loss in {unit}" in " ".join(shown.split())
    assert f"<th>loss, {html.escape(unit)}</th>" in page
    assert "nats per token" not in card + page + shown
    assert "perplexity" not in shown or head == "masked"
    assert {metric.name for metric in run.task.metrics} == set(searched.metrics)

    # Another process makes the same judge, and an export is trained further on its own.
    judge = run.judge("validation", 4)
    facts, arrays = judge.plain()
    rebuilt = Judge.of(json.loads(json.dumps(facts)), arrays, torch.device("cpu"))
    assert rebuilt(trials[0].architecture) == judge(trials[0].architecture)
    settings = yaml.safe_load((folder / "retrain.yaml").read_text())
    assert ("source" in settings) is (head == "none")
    overrides = ["retrain.steps=20", "retrain.learning_rate=0.001", "retrain.warmup_steps=2", "retrain.batch_size=8"]
    further, _ = retrain_export(folder, overrides, Reporter(), lambda: False)
    assert further.loss < searched.loss + 0.05
    assert "skipped" in _again(tmp_path, encoder(head), corpus_folder)


def _again(folder: Path, model: Path, files: Path) -> str:
    second = open_run(folder, model, files)
    finish(second)
    return said(second)


@pytest.mark.parametrize("head", ["masked", "none"])
def test_recovery_brings_it_nearer_to_the_trained_model(
    head: str, encoder: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    """Distillation, and training on what the task says; without a head both are the same."""
    losses = {}
    for steps, distil in ((0, True), (40, True), (40, False)):
        run = open_run(
            tmp_path, encoder(head), corpus_folder, "budget.flops=70%", "export.front=0", "retrain.rivals=false",
            f"retrain.steps={steps}", f"retrain.distil={str(distil).lower()}", "retrain.learning_rate=0.002",
            "retrain.warmup_steps=2", "retrain.batch_size=8",
        )  # fmt: skip
        finish(run)
        losses[steps, distil] = load_results(only(run))[0].loss
    if head == "none":
        assert losses[40, True] == losses[40, False] < losses[0, True]
    else:
        assert losses[40, True] != losses[40, False]
        assert max(losses.values()) < losses[0, True] + 0.05


def test_two_workers_train_an_encoder_alike(
    encoder: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    losses = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        run = open_run(
            folder, encoder("masked"), corpus_folder, "export.front=0", "retrain.rivals=false", "retrain.steps=4",
            f"train.workers={workers}", "retrain.batch_size=8",
        )  # fmt: skip
        finish(run)
        losses.append(load_results(only(run))[0].loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_what_an_encoder_cannot_do_is_one_message(
    encoder: Callable[[str], Path], corpus_folder: Path, tmp_path: Path, micro_config: Path
) -> None:
    with pytest.raises(MoesaicError, match=r"(?s)latency.phase: an encoder sees all tokens at once.*nearest: prefill"):
        open_run(tmp_path, encoder("masked"), corpus_folder, "latency.phase=decode")
    for head, activation in (("none", "swiglu"), ("masked", "gelu")):
        settings = [f"space.backbone.head={head}", f"space.backbone.activation={activation}"]
        with pytest.raises(MoesaicError, match=r"(?s)space.backbone.head: this head is that of an encoder.*from: DIR"):
            load_config(micro_config, settings)
    folder = tmp_path / "other"
    folder.mkdir()
    for file in encoder("masked").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    train_tokenizer([path.read_text() for path in corpus_folder.rglob("*.txt")], 300).save(
        str(folder / "tokenizer.json")
    )
    with pytest.raises(MoesaicError, match=rf"{folder}/tokenizer.json: the tokenizer has no \[CLS\]"):
        finish(open_run(tmp_path, folder, corpus_folder))
