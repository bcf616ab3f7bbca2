"""Which settings decide the files of which stage: every key of the configuration is in a table, and kept to it."""

import pytest
import torch
import yaml
from pydantic import BaseModel

from moesaic.nas import tasks
from moesaic.nas.config import Config
from moesaic.nas.device import usable_processors
from moesaic.nas.stages import run as run_module
from moesaic.nas.stages.directory import StageDirectory
from moesaic.nas.stages.run_search import load_search
from moesaic.nas.stages.stage import BY_NAME, STAGES
from moesaic.search_spaces.files import write_json
from tests.nas.conftest import write_corpus
from tests.nas.run_tools import do_stage, only, open_run, said, without_stages

ALL = {stage.name for stage in STAGES}
FROM_SEARCH = {"search", "fidelity", "export", "retrain", "report"}
FROM_FIDELITY = FROM_SEARCH - {"search"}
FROM_EXPORT = FROM_FIDELITY - {"fidelity"}
SHOWN = {"report"}
"""Only the page, which shows every setting. Where evaluations and trainings run, and how often they are tried again,
decides their results up to rounding and the order in which they end."""

TRAINING = {
    "batch_size": "8",
    "learning_rate": "0.001",
    "warmup_steps": "2",
    "weight_decay": "0.2",
    "clip_norm": "0.5",
    "balance_weight": "0.02",
    "label_smoothing": "0.1",
    "dropout": "0.1",
    "checkpoint_every": "7",
}
TABLE: dict[str, tuple[list[str], set[str]]] = {
    "name": (["name=other"], {"export", "report"}),
    "seed": (["seed=1"], ALL),
    "data.kind": (["data={vocab_size: 300, sequence_length: 32}"], ALL - {"latency"}),
    "data.files": (["data.files=[FOLDER]"], ALL - {"latency"}),
    "data.field": (["data.field=body"], ALL - {"latency"}),
    "data.tokenizer": (["data.vocab_size=2048", "data.tokenizer=TOKENIZER"], ALL - {"latency"}),
    "data.vocab_size": (["data.vocab_size=310"], ALL),
    "data.sequence_length": (["data.sequence_length=40"], ALL),
    "space": (["space={preset: tiny, backbone: {tied: false}}"], ALL),
    "budget": (["budget.flops=70%"], FROM_SEARCH),
    "budgets": (["budget={}", "budgets={a: {flops: 75%, parameters: 80%}}"], FROM_SEARCH),
    "device.device": (["device.device=auto"], {"export", "report"}),
    "device.dtype": (["device.dtype=bfloat16"], ALL),
    "device.threads": (["device.threads=2"], ALL),
    "train.workers": (["train.workers=2"], SHOWN),
    "train.restarts": (["train.restarts=1"], SHOWN),
    "train.shard": (["train={workers: 2, shard: true}"], SHOWN),
    "supernet.steps": (["supernet.steps=7"], ALL - {"latency"}),
    "supernet.sharing": (["supernet.sharing=packed"], ALL - {"latency"}),
    "supernet.largest_first": (["supernet.largest_first=0.5"], ALL - {"latency"}),
    "latency.phase": (["latency.phase=decode"], ALL - {"supernet"}),
    "latency.batch_size": (["latency.batch_size=3"], ALL - {"supernet"}),
    "latency.sequence_length": (["latency.sequence_length=16"], ALL - {"supernet"}),
    "latency.models": (["latency.models=13"], ALL - {"supernet"}),
    "latency.repeats": (["latency.repeats=4"], ALL - {"supernet"}),
    "latency.time_limit": (["latency.time_limit=9"], ALL - {"supernet"}),
    "search.sampler": (["search.sampler=random"], FROM_SEARCH),
    "search.trials": (["search.trials=20"], FROM_SEARCH),
    "search.objectives": (["search.objectives=[loss, memory]"], FROM_SEARCH),
    "search.population": (["search.population=9"], FROM_SEARCH),
    "search.evaluation_windows": (["search.evaluation_windows=9"], FROM_SEARCH),
    "executor.kind": (["executor.kind=ray"], SHOWN),
    "executor.address": (["executor={kind: ray, address: auto}"], SHOWN),
    "executor.lanes": (["executor={kind: ray, lanes: 2}"], SHOWN),
    "executor.resources.cpu": (["executor={kind: ray, resources: {cpu: 2}}"], SHOWN),
    "executor.resources.gpu": (["executor={kind: ray, resources: {gpu: 1}}"], SHOWN),
    "executor.retries": (["executor={kind: ray, retries: 1}"], SHOWN),
    "executor.time_limit": (["executor={kind: ray, time_limit: 5}"], SHOWN),
    "executor.storage": (["executor={kind: tune, storage: /tmp/tune}"], SHOWN),
    "executor.loggers": (["executor={kind: tune, storage: /tmp/tune, loggers: [csv]}"], SHOWN),
    "questions": (["questions=questions.jsonl"], {"retrain", "report"}),
    "mirror": (["mirror=sqlite:///t.db"], {"search", "report"}),
    "fidelity.check": (["fidelity.check=4"], FROM_FIDELITY),
    "fidelity.steps": (["fidelity.steps=7"], FROM_FIDELITY),
    "export.front": (["export.front=1"], FROM_EXPORT),
    "retrain.steps": (["retrain.steps=7"], FROM_EXPORT),
    "retrain.seeds": (["retrain.seeds=2"], FROM_EXPORT),
    "retrain.init": (["retrain.init=inherited"], FROM_EXPORT),
    "retrain.rivals": (["retrain.rivals=false"], FROM_EXPORT),
    "retrain.evaluation_windows": (["retrain.evaluation_windows=9"], FROM_FIDELITY),
}
TABLE |= {f"supernet.{key}": ([f"supernet.{key}={value}"], ALL - {"latency"}) for key, value in TRAINING.items()}
TABLE |= {f"retrain.{key}": ([f"retrain.{key}={value}"], FROM_FIDELITY) for key, value in TRAINING.items()}


OF_TRAINED = {"model", "retrain.repair_windows", "retrain.distil"}
"""Keys of runs that start from a trained model; see test_from_model."""

OF_PARALLEL = {"data.vocabulary", "latency.beam", "latency.source_length", "search.judge"}
"""Keys of runs that learn to translate; see test_translation."""


def keys_of(model: type[BaseModel], prefix: str = "") -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        inner = isinstance(kind, type) and issubclass(kind, BaseModel)
        found |= keys_of(kind, f"{prefix}{name}.") if inner else {prefix + name}
    return found


def test_every_key_of_the_configuration_is_in_the_table():
    assert keys_of(Config) == TABLE.keys() | OF_TRAINED | OF_PARALLEL


@pytest.fixture(scope="module")
def base(micro_config, quick_run):
    run = open_run(micro_config, quick_run)
    return run.task.corpus, inputs_of(run)


def inputs_of(run) -> dict[str, dict]:
    """Every stage's inputs, as they are once the stages before it are done and have found the same, where something
    needs the latency."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.Run, "needs_latency", True)
        patch.setattr(StageDirectory, "settled", property(lambda stage: (stage.path / "artifact.json").exists()))
        return {stage.name: dict(run.budgets[0].folder(stage.name).inputs) for stage in STAGES}


@pytest.mark.parametrize("key", TABLE)
def test_a_setting_is_an_input_of_exactly_the_stages_whose_files_it_decides(
    key, base, micro_config, quick_run, tmp_path, monkeypatch
):
    overrides, expected = TABLE[key]
    corpus, before = base
    if key == "device.threads" and usable_processors() < 2:
        pytest.skip("one processor")
    if not key.startswith("data.") or key == "data.kind":  # the standard library takes long to encode
        monkeypatch.setattr(tasks, "load_corpus", lambda *arguments, **own: corpus)
    if key == "data.tokenizer":
        overrides = [setting.replace("TOKENIZER", str(quick_run / "exports" / "best")) for setting in overrides]
    elif key == "questions":
        (tmp_path / "questions.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}')
        overrides = [f"questions={tmp_path / 'questions.jsonl'}"]
    elif key == "data.files":
        overrides = [f"data.files=[{write_corpus(tmp_path / 'other', seed=1)}]"]
    run = open_run(micro_config, quick_run, *overrides)
    try:
        after = inputs_of(run)
    finally:
        torch.set_num_threads(1)
    changed = {name for name in ALL if before[name] != after[name]}
    assert changed == expected


@pytest.fixture
def copied(quick_run, tmp_path):
    return without_stages(quick_run, tmp_path / "run")


def test_settings_of_retraining_reach_the_exports_and_leave_the_models(micro_config, copied):
    models = {path: path.stat().st_mtime_ns for path in (copied / "exports").rglob("*.safetensors")}
    run = open_run(micro_config, copied, "retrain.steps=9", "name=other")
    do_stage(run, "export")
    files = list((copied / "exports").glob("*/retrain.yaml"))
    assert len(files) == len(models)
    for file in files:
        settings = yaml.safe_load(file.read_text())
        assert (settings["retrain"]["steps"], settings["name"]) == (9, "other")
    assert {path: path.stat().st_mtime_ns for path in (copied / "exports").rglob("*.safetensors")} == models
    assert "export: continues, because" in said(run)
    assert not (copied / "previous").exists()


def test_fewer_trials_give_the_search_of_so_many_and_keep_the_others(micro_config, quick_run, copied, tmp_path):
    log = copied / "search" / "trials.jsonl"
    text = log.read_text()
    fewer = open_run(micro_config, copied, "search.trials=15")
    do_stage(fewer, "search")
    assert log.read_text() == text
    trials, result = load_search(only(fewer))
    assert sum(trial.ended for trial in trials) == 15
    fresh = open_run(micro_config, without_stages(quick_run, tmp_path / "fresh", "search"), "search.trials=15")
    do_stage(fresh, "search")
    for name in ("pareto.csv", "rivals.json", "search.json"):
        assert (copied / "search" / name).read_text() == (fresh.path / "search" / name).read_text(), name
    assert [t.architecture for t in load_search(only(fresh))[1].front] == [t.architecture for t in result.front]
    more = open_run(micro_config, copied)
    do_stage(more, "search")
    assert log.read_text() == text
    assert sum(trial.ended for trial in load_search(only(more))[0]) == 24


def test_another_limit_of_a_named_budget_is_another_search(micro_config, copied):
    def changed(before: str, now: str) -> list[str]:
        runs = [open_run(micro_config, copied, "budget={}", f"budgets={budgets}") for budgets in (before, now)]
        first, second = (run.folder("search") for run in runs)
        write_json(first.path / "inputs.json", first.inputs)
        return [str(change) for change in second.changes() if not change.under(BY_NAME["search"].extendable)]

    assert changed("{a: {flops: 60%}}", "{a: {flops: 60%}, b: {flops: 50%}}") == []
    assert changed("{a: {flops: 60%}, b: {flops: 50%}}", "{a: {flops: 60%}}") == []
    for other in ("{a: {flops: 61%}}", "{a: {flops: 60%, parameters: 90%}}", "{a: {flops: {limit: 60%, bind: worst}}}"):
        assert changed("{a: {flops: 60%}}", other), other
