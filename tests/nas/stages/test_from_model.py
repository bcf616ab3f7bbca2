"""A run that starts from a trained model: from a folder of another program to a sparse export, with every stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesaic.nas.config import load_config
from moesaic.nas.data import load_corpus
from moesaic.nas.exports.folder import load_exported
from moesaic.nas.plan import build_plan
from moesaic.nas.stages.directory import StageDirectory
from moesaic.nas.stages.retrain_models import load_results, load_source
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.run_search import load_search
from moesaic.nas.stages.split_model import SCORES, PartScores, load_scores
from moesaic.nas.stages.stage import STAGES
from moesaic.nas.tasks import LanguageModelling
from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, MoesaicError, Router
from moesaic.search_spaces.architecture import Stack
from moesaic.search_spaces.files import read_value
from moesaic.supernet import TrainData, TrainSettings, Transformer, evaluate, train
from moesaic.supernet.convert import open_checkpoint, write_folder
from tests.nas.run_tools import finish, only, said
from tests.nas.run_tools import open_run as open_quick_run

CONFIG = """\
name: sparse
data: {{kind: text, files: ['{files}'], sequence_length: 32}}
model: {{from: '{model}', calibration_windows: 16}}
space: {{preset: from-model, expert_sizes: [16, 32], shared: [0.25, 0.5], active: [0.25, 0.5], kept: [0.25, 0.5, 0.75]}}
budget: {{flops: 80%}}
device: {{device: cpu, threads: 1}}
latency: {{batch_size: 1, models: 12, repeats: 3}}
search: {{trials: 8, evaluation_windows: 8}}
export: {{front: 1}}
retrain: {{repair_windows: 16, evaluation_windows: 8}}
"""
LAYER = Layer(Attention(4, 2), FeedForward((256,)))
KINDS = {
    "llama": Architecture(Stack(32, (LAYER,) * 2), Backbone(head_size=8, tied=True)),
    "mixtral": Architecture(
        Stack(32, (Layer(Attention(4, 2), FeedForward((48,) * 8, Router("top_k", k=2))),) * 2),
        Backbone(head_size=8, norm_eps=1e-5, tied=False),
    ),
}


@pytest.fixture(scope="module")
def trained(corpus_folder: Path, micro_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of a kind, trained for some seconds on the corpus, with its tokenizer."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("trained") / kind
            task = LanguageModelling(load_corpus(load_config(micro_config).config.data, "data"))
            torch.manual_seed(0)
            model = Transformer(KINDS[kind], task.vocab_size)
            data = TrainData(lambda step: task.batch(8, 0, step), lambda step: [model.architecture])
            train(model, data, TrainSettings(80, 1e-2, 5), folder.parent / "training", kind)
            write_folder(model, folder, kind)
            (folder / "tokenizer.json").write_bytes(task.tokenizer.read_bytes())
            made[kind] = folder
        return made[kind]

    return make


def open_run(folder: Path, model: Path, files: Path, *overrides: str) -> Run:
    path = folder / "sparse.yaml"
    path.write_text(CONFIG.format(files=files, model=model))
    run = open_quick_run(path, folder / "run")  # without the settings of quick runs
    run.loaded = load_config(path, overrides)
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_folder_to_a_sparse_export_that_loads(
    kind: str, trained: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(trained(kind)).load()
    run = open_run(tmp_path, trained(kind), corpus_folder)
    shown = finish(run)
    part = only(run)

    # The largest member is the trained model, and every member a slice of the same weights.
    assert run.space.largest == run.space.source == KINDS[kind]
    batch = run.task.held_out("test", 8)
    torch.testing.assert_close(run.supernet(batch.tokens, KINDS[kind]), source(batch.tokens), atol=1e-4, rtol=1e-4)

    trials, result = load_search(part)
    assert all(trial.engine["puzzle"]["role"] == "solution" for trial in trials)
    whole = run.pricer.expected(KINDS[kind])["flops"]
    assert part.budget.lines[0].limit == pytest.approx(0.8 * whole)
    assert result.best.costs["flops"] <= 0.8 * whole

    searched, *rivals = load_results(part)
    assert (searched.init, searched.steps) == ("repaired", 0)
    assert {rival.name for rival in rivals} <= {"uniform", "dense"}
    exported = load_exported(part.folder("export").path / "best")
    assert exported.architecture == searched.architecture
    assert evaluate(exported, batch).loss == pytest.approx(searched.loss, abs=0.2)
    assert "the trained model's weights, repaired, not trained" in shown

    # What it costs and saves beside the trained model, in the terminal and on the page.
    trained_model = load_source(part)
    assert trained_model is not None
    assert trained_model.loss == pytest.approx(evaluate(source, batch).loss, rel=1e-4)
    assert trained_model.measured["flops"] == pytest.approx(whole)
    assert f"{searched.loss - trained_model.loss:+.4f} nats per token" in " ".join(shown.split())
    page = (part.folder("report").path / "index.html").read_text()
    for name in ("quality", "activity", *(["captured", "errors"] if kind == "llama" else ["errors"])):
        assert f'id="{name}"' in page
    assert page.count(f"{trained_model.loss:.4f} ± {trained_model.standard_error:.4f}") == 1

    # The export is a model to start from, too.
    again = open_checkpoint(part.folder("export").path / "best")
    torch.testing.assert_close(again.load()(batch.tokens), exported(batch.tokens))

    assert "skipped" in finish_again(run, tmp_path, trained(kind), corpus_folder)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_layers_may_be_left_out(
    kind: str, trained: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    """A budget so low that something has to go; the export loads, and is a model to start from."""
    run = open_run(
        tmp_path, trained(kind), corpus_folder, "space={preset: from-model, kept: [0.5], prune: [heads, layers]}",
        "budget.flops=45%", "search.trials=12",
    )  # fmt: skip
    finish(run)
    part = only(run)
    found = read_value(run.folder("supernet").path / SCORES, PartScores)
    gone = [score for score in found.parts if score.part in (Attention(0, 0), FeedForward(()))]
    assert len(gone) == 4
    assert all(score.error == pytest.approx(1) and score.loss >= 0 for score in gone)
    trials, _ = load_search(part)
    assert all(trial.engine["puzzle"]["role"] == "solution" for trial in trials)
    blocks = {sum(layer.blocks for layer in trial.architecture.layers.values()) for trial in trials}
    heads = {layer.attention.heads for trial in trials for layer in trial.architecture.layers.values()}
    assert min(blocks) < 4 or heads != {4}
    exported = load_exported(part.folder("export").path / "best")
    again = open_checkpoint(part.folder("export").path / "best").load()
    tokens = run.task.held_out("test", 4).tokens
    torch.testing.assert_close(again(tokens), exported(tokens))


def test_questions_are_answered_by_every_model_and_others_keep_the_models(
    trained: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "import", "choices": ["os", "return"], "answer": 0}\n' * 3)
    settings = (f"questions={file}", "retrain.steps=3", "retrain.warmup_steps=1")
    run = open_run(tmp_path, trained("llama"), corpus_folder, *settings)
    shown = finish(run)
    results, source = load_results(only(run)), load_source(only(run))
    assert source is not None
    assert all(model.metrics["accuracy"] in (0.0, 1.0) for model in (*results, source))
    assert "accuracy" in shown
    assert f"{source.metrics['accuracy']:.1%}" in (run.path / "report" / "index.html").read_text()

    weights = [path.stat().st_mtime_ns for path in sorted((run.path / "retrain").rglob("model.safetensors"))]
    file.write_text('{"question": "import", "choices": ["os", "return"], "answer": 1}\n')
    again = open_run(tmp_path, trained("llama"), corpus_folder, *settings)
    finish(again)
    for before, after in zip(results, load_results(only(again)), strict=True):
        assert after.loss == before.loss
        assert after.metrics["accuracy"] == 1 - before.metrics["accuracy"]
    assert weights == [path.stat().st_mtime_ns for path in sorted((run.path / "retrain").rglob("model.safetensors"))]
    file.unlink()
    with pytest.raises(MoesaicError, match="cannot be read"):
        finish(open_run(tmp_path, trained("llama"), corpus_folder, *settings))


def finish_again(run: Run, folder: Path, model: Path, files: Path) -> str:
    second = open_run(folder, model, files)
    finish(second)
    return said(second)


def test_mlp_routers_are_searched_priced_and_exported(
    trained: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    run = open_run(tmp_path, trained("llama"), corpus_folder, "space.router=[mlp]", "budget.flops=75%")
    finish(run)
    part = only(run)
    (uniform,) = (result for result in load_results(part) if result.name == "uniform")
    routers = [layer.feed_forward.router for layer in uniform.architecture.layers.values()]
    assert all(router is not None and router.score == "mlp" for router in routers)
    exported = load_exported(part.folder("retrain").path / "uniform" / f"seed-{run.config.seed}")
    assert uniform.measured["parameters"] == sum(weight.numel() for weight in exported.parameters())
    tokens = run.task.held_out("test", 2).tokens
    inherited, own = run.supernet.extract(uniform.architecture), run.supernet
    torch.testing.assert_close(inherited(tokens), own(tokens, uniform.architecture), atol=1e-4, rtol=1e-4)


def test_scores_add_up_to_the_compressed_network_and_decide_the_search(
    trained: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    run = open_run(tmp_path, trained("llama"), corpus_folder)
    finish(run)
    found = read_value(run.folder("supernet").path / SCORES, PartScores)
    assert {score.slot for score in found.parts} == set(run.space.layers)
    whole = [score for score in found.parts if score.part == LAYER.feed_forward]
    assert len(whole) == 2
    assert all(score.error < 1e-6 and score.loss < 1e-6 for score in whole)
    scores = load_scores(run)
    assert scores is not None
    judge = run.judge("validation", 8)
    assert scores.predict(run.space.largest) == pytest.approx(judge(run.space.largest).loss, rel=0.2)
    trials, _ = load_search(only(run))
    assert all(trial.engine["puzzle"]["predicted"] == scores.predict(trial.architecture) for trial in trials)


def test_recovery_imitates_the_trained_model(
    trained: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    """With steps, models go on from the repaired weights towards the teacher: losses fall, and a run continues."""
    run = open_run(tmp_path, trained("llama"), corpus_folder, "budget.flops=60%", "export.front=0")
    finish(run)
    before = load_results(only(run))[0]
    longer = open_run(
        tmp_path, trained("llama"), corpus_folder, "budget.flops=60%", "export.front=0", "retrain.steps=40",
        "retrain.learning_rate=0.002", "retrain.warmup_steps=2", "retrain.batch_size=8", "fidelity.check=4",
        "fidelity.steps=2", "search.trials=8",
    )  # fmt: skip
    shown = finish(longer)
    after = load_results(only(longer))[0]
    if after.fingerprint == before.fingerprint:  # the check may correct the choice
        assert after.loss < before.loss
    assert "40 steps from the trained model's weights, repaired" in shown
    record = (longer.path / "retrain" / "searched" / "seed-0" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(record)["loss"] >= 0  # a divergence, not a cross-entropy


def test_the_executors_evaluate_members_alike(
    trained: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    from moesaic.supernet import Judge

    run = open_run(tmp_path, trained("llama"), corpus_folder)
    finish(run)
    judge = run.judge("validation", 4)
    facts, arrays = judge.plain()
    rebuilt = Judge.of(json.loads(json.dumps(facts)), arrays, torch.device("cpu"))
    trials, _ = load_search(only(run))
    for trial in trials[:3]:
        assert rebuilt(trial.architecture) == judge(trial.architecture)


AFTER_SEARCH = {"fidelity", "export", "retrain", "report"}
ALL_BUT_LATENCY = {"supernet", "search"} | AFTER_SEARCH
INPUTS = {
    "model.calibration_windows": (["model.calibration_windows=17"], ALL_BUT_LATENCY),
    "model.cluster": (["model.cluster=weights"], ALL_BUT_LATENCY),
    "model.router": (["model.router=similarity"], ALL_BUT_LATENCY),
    "model.from": ([], ALL_BUT_LATENCY),
    "space.prune": (["space.prune=[layers]"], ALL_BUT_LATENCY | {"latency"}),
    "space.active": (["space.active=[0.75]"], ALL_BUT_LATENCY | {"latency"}),
    "retrain.repair_windows": (["retrain.repair_windows=17"], AFTER_SEARCH),
    "retrain.distil": (["retrain.distil=false"], AFTER_SEARCH),
    "retrain.init": (["retrain.init=inherited"], AFTER_SEARCH),
}


@pytest.mark.parametrize("key", INPUTS)
def test_a_setting_is_an_input_of_the_stages_whose_files_it_decides(
    key: str, trained: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    def inputs(run: Run) -> dict[str, dict]:
        run.latency_asked = True
        return {stage.name: dict(only(run).folder(stage.name).inputs) for stage in STAGES}

    finish(open_run(tmp_path, trained("llama"), corpus_folder))
    before = inputs(open_run(tmp_path, trained("llama"), corpus_folder))
    overrides, expected = INPUTS[key]
    if key == "model.from":  # other weights of the same architecture
        model = open_checkpoint(trained("llama")).load()
        with torch.no_grad():
            next(iter(model.parameters())).add_(1e-3)
        write_folder(model, tmp_path / "other", "llama")
        (tmp_path / "other" / "tokenizer.json").write_bytes((trained("llama") / "tokenizer.json").read_bytes())
        overrides = [f"model.from={tmp_path / 'other'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageDirectory, "settled", property(lambda stage: (stage.path / "artifact.json").exists()))
        after = inputs(open_run(tmp_path, trained("llama"), corpus_folder, *overrides))
    assert {name for name in before if before[name] != after[name]} == expected


@pytest.mark.parametrize(("sampler", "kind"), [("evolution", "llama"), ("tpe", "mixtral"), ("nsga2", "llama")])
def test_any_sampler_searches_the_space_and_the_study_follows(
    sampler: str, kind: str, trained: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    """Threshold routers on predicted mass included."""
    run = open_run(
        tmp_path, trained(kind), corpus_folder, f"search.sampler={sampler}", "search.population=8", "search.trials=16",
        "space.threshold=[0.4, 0.7]", "retrain.rivals=false",
    )  # fmt: skip
    finish(run)
    assert "stops here" not in said(run)
    trials, result = load_search(only(run))
    assert sum(trial.ended for trial in trials) == 16
    assert result.best.costs["flops"] <= only(run).budget.lines[0].limit


def test_a_plan_prices_the_space_and_estimates_the_stages(
    trained: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    run = open_run(tmp_path, trained("llama"), corpus_folder)
    found = build_plan(only(run), latency=True)
    assert (found.space, found.cardinality, found.problem) == ("from-model", run.space.cardinality, None)
    assert found.budget[0].limit < found.costs["flops"].largest
    assert found.seconds["supernet"] > 0


WRONG = {
    "a misspelt key": (
        ["model.form=x"],
        r"(?s)model.form: unknown key.*allowed: +calibration_windows, cluster, from, router\n.*nearest: from$",
    ),
    "no folder": (["model.from=nowhere"], "nowhere: no such folder"),
    "another space": (
        ["space=small"],
        "(?s)space: the space of a run that starts from a trained model.*preset: from-model",
    ),
    "an unknown key": (["space.experts=[4]"], "space.experts"),
    "a share above 1": (["space.active=[1.5]"], "space.active"),
    "a foreign tokenizer": (["data.tokenizer=other"], "a run that starts from a model has that model's tokenizer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_one_message(
    name: str, trained: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    overrides, message = WRONG[name]
    with pytest.raises(MoesaicError, match=message):
        open_run(tmp_path, trained("llama"), corpus_folder, *overrides)


def test_what_needs_a_trained_model_says_so(micro_config: Path) -> None:
    with pytest.raises(MoesaicError, match=r"(?s)this space is that of a trained model.*model: \{from: DIR\}"):
        load_config(micro_config, ["space=from-model"])
    for setting in ("retrain.init=repaired", "retrain.distil=true"):
        with pytest.raises(MoesaicError, match=r"(?s)only a trained model can be repaired or imitated"):
            load_config(micro_config, [setting])


def test_a_budget_that_nothing_meets_is_told_before_the_model_is_read(
    trained: Callable[[str], Path], corpus_folder: Path, tmp_path: Path
) -> None:
    run = open_run(tmp_path, trained("llama"), corpus_folder, "budget.flops=5%")
    with pytest.raises(MoesaicError, match="no architecture of space from-model meets the budget"):
        finish(run)
    assert not (tmp_path / "run" / "supernet").exists()
