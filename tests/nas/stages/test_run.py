"""Whole runs: what they leave, that they resume after every kind of end, and that nothing computed is lost."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from moesaic.nas.exports.folder import load_exported
from moesaic.nas.stages.stage import STAGES
from moesaic.search_spaces import Architecture, MoesaicError
from tests.nas.command import interrupt_when, lines_in, moesaic, moesaic_apart, start


@pytest.fixture(scope="module")
def finished(micro_config, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    result = moesaic_apart("run", micro_config, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "Chosen architecture" in result.stdout
    assert str(out / "report" / "index.html") in result.stdout.replace("\n", "")
    return out


def outcome(run: Path) -> dict:
    """All that must be the same in two runs of one seed: history, choice, and what retraining gave."""
    trials = [json.loads(line) for line in (run / "search" / "trials.jsonl").read_text().splitlines()]
    results = json.loads((run / "retrain" / "results.json").read_text())
    return {
        "history": [(t["number"], t["state"], t["fingerprint"], t["loss"], t["standard_error"]) for t in trials],
        "chosen": json.loads((run / "summary.json").read_text())["chosen"]["fingerprint"],
        "retrained": [(r["name"], r["fingerprint"], r["loss"]) for r in results],
    }


def test_the_summary_has_every_figure(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert {line["name"] for line in summary["budget"]} == {"flops", "parameters"}
    for line in summary["budget"]:
        assert set(line) >= {"name", "limit", "predicted", "measured", "unit"}
        assert line["predicted"] <= line["limit"]
        assert line["status"] in ("inside", "within tolerance", "over")
    assert summary["chosen"]["refused"] == []
    assert {model["name"] for model in summary["rivals"]} == {"uniform", "dense"}
    assert set(summary["stage_seconds"]) >= {stage.name for stage in STAGES} - {"report"}
    assert summary["versions"]["torch"]
    assert summary["seed"] == 0
    chosen = Architecture.from_dict(summary["chosen"]["architecture"])
    assert chosen.fingerprint == summary["chosen"]["fingerprint"]


def test_the_exported_model_is_the_searched_one(finished):
    figures = json.loads((finished / "exports" / "best-inherited" / "figures.json").read_text())
    assert figures["slice_max_logit_difference"] <= 1e-4
    assert figures["reload_max_logit_difference"] == 0
    model = load_exported(finished / "exports" / "best-inherited")
    count = sum(p.numel() for p in model.parameters())
    assert figures["measured"]["parameters"] == figures["predicted"]["parameters"] == count
    card = (finished / "exports" / "best-inherited" / "README.md").read_text()
    assert model.architecture.fingerprint in card


def test_latency_is_not_calibrated_where_nothing_needs_it_and_the_report_says_so(finished):
    assert not (finished / "latency" / "predictor.json").exists()
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["latency_predictor"] is summary["chosen"]["latency"] is None
    assert set(summary["chosen"]["measured"]) == {"flops", "parameters", "active_parameters", "memory"}
    said = "no budget line and no objective needs it"
    assert said in (finished / "exports" / "best" / "README.md").read_text()
    assert said in (finished / "report" / "index.html").read_text()


def test_a_second_run_skips_what_is_complete(finished, micro_config):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    result = moesaic("run", micro_config, "--out", finished)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("complete, skipped") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before
    assert "Chosen architecture" in result.stdout


def test_a_run_killed_in_three_stages_ends_as_one_that_was_not(finished, micro_config, tmp_path):
    out = tmp_path / "killed"
    moments = {
        "supernet": (out / "supernet" / "checkpoint.safetensors").exists,
        "search": lambda: lines_in(out / "search" / "trials.jsonl") >= 7,
        "retrain": (out / "retrain" / "uniform" / "seed-0" / "checkpoint.safetensors").exists,
    }
    for stage, moment in moments.items():
        process = start("run", micro_config, "--out", out)
        status, _ = interrupt_when(process, moment, signal.SIGKILL)
        assert status == -signal.SIGKILL, stage
    result = moesaic("run", micro_config, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "continues where it stopped" in result.stderr
    assert outcome(out) == outcome(finished)
    losses = [
        [json.loads(line)["loss"] for line in (run / "supernet" / "metrics.jsonl").read_text().splitlines()]
        for run in (out, finished)
    ]
    assert losses[0] == losses[1]
    first, second = (load_file(run / "supernet" / "model.safetensors") for run in (out, finished))
    assert all(first[name].equal(second[name]) for name in second)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_asked_to_stop_keeps_everything_and_continues(number, micro_config, tmp_path):
    out = tmp_path / "asked"
    process = start("run", micro_config, "--out", out, "supernet.steps=400", "supernet.checkpoint_every=1000")
    status, err = interrupt_when(process, lambda: lines_in(out / "supernet" / "metrics.jsonl") >= 1, number)
    assert status == 130
    assert "the same command continues" in err
    assert "Traceback" not in err
    assert (out / "supernet" / "checkpoint.safetensors").exists()
    process = start("supernet", micro_config, "--out", out, "supernet.steps=400", "supernet.checkpoint_every=1000")
    interrupt_when(process, lambda: lines_in(out / "supernet" / "metrics.jsonl") >= 3, signal.SIGKILL)
    records = [json.loads(line) for line in (out / "supernet" / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps))


def test_more_trials_continue_the_search_and_other_changes_start_it_anew(finished, micro_config, tmp_path):
    out = tmp_path / "changed"
    shutil.copytree(finished, out)
    old = (out / "search" / "trials.jsonl").read_text()
    more = moesaic("search", micro_config, "--out", out, "search.trials=36")
    assert more.returncode == 0, more.stderr
    assert "search.trials changed from 30 to 36" in more.stderr
    assert (out / "search" / "trials.jsonl").read_text().startswith(old)
    other = moesaic("search", micro_config, "--out", out, "search.sampler=random")
    assert other.returncode == 0, other.stderr
    assert "search.sampler changed from evolution to random" in other.stderr
    assert (out / "previous" / "search-1" / "trials.jsonl").read_text().startswith(old)


def test_a_stage_alone_names_the_one_it_needs(micro_config, tmp_path):
    result = moesaic("search", micro_config, "--out", tmp_path / "empty")
    assert result.returncode == 2
    assert "moesaic supernet" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_export_is_retrained_and_continues_from_where_it_was(finished, tmp_path):
    export = tmp_path / "best-inherited"
    shutil.copytree(finished / "exports" / "best-inherited", export)
    process = start("retrain", export, "retrain.steps=400", "retrain.init=inherited")
    interrupt_when(process, (export / "retrained" / "seed-0" / "checkpoint.safetensors").exists, signal.SIGKILL)
    result = moesaic("retrain", export, "retrain.steps=60", "retrain.init=inherited")
    assert result.returncode == 2  # another number of steps is another run
    assert "checkpoint of another run" in result.stderr
    (export / "retrained" / "seed-0" / "checkpoint.safetensors").unlink()
    result = moesaic("retrain", export, "retrain.steps=60", "retrain.init=inherited")
    assert result.returncode == 0, result.stderr
    facts = json.loads((export / "retrained" / "result.json").read_text())
    figures = json.loads((export / "figures.json").read_text())
    assert facts["loss"] < figures["loss"]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", "truncated|belongs to another model"),
        ("model.safetensors", b"not a checkpoint at all", "truncated or not"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b'{"model_type": "gpt2"}', "not the configuration"),
    ],
)
def test_a_damaged_or_foreign_export_is_one_message(finished, tmp_path, file, content, words):
    export = tmp_path / "best"
    shutil.copytree(finished / "exports" / "best", export)
    (export / file).write_bytes(content)
    with pytest.raises(MoesaicError, match=words):
        load_exported(export)


def test_weights_of_another_architecture_are_refused(finished, tmp_path):
    export = tmp_path / "best"
    shutil.copytree(finished / "exports" / "best", export)
    config = json.loads((export / "config.json").read_text())
    config["architecture"]["decoder"]["width"] = 16
    (export / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoesaicError, match="belongs to another model"):
        load_exported(export)


def test_an_export_of_an_earlier_version_says_so(finished, tmp_path):
    export = tmp_path / "best"
    shutil.copytree(finished / "exports" / "best", export)
    config = json.loads((export / "config.json").read_text())
    del config["architecture"]["format"]
    (export / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoesaicError, match="another format: files of earlier versions") as caught:
        load_exported(export)
    assert caught.value.allowed == "format: 2"


def test_a_truncated_supernet_is_one_message(finished, micro_config, tmp_path):
    out = tmp_path / "damaged"
    shutil.copytree(finished, out)
    weights = out / "supernet" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (out / "search" / "artifact.json").unlink()
    result = moesaic("search", micro_config, "--out", out)
    assert result.returncode == 2
    assert "truncated" in result.stderr
    assert "Traceback" not in result.stderr


def test_two_processes_do_not_share_a_directory(micro_config, tmp_path):
    out = tmp_path / "shared"
    first = start("supernet", micro_config, "--out", out, "supernet.steps=5000")
    try:
        while not (out / "supernet" / "metrics.jsonl").exists():
            assert first.poll() is None
        second = moesaic("supernet", micro_config, "--out", out)
        assert second.returncode == 2
        assert "another moesaic is running" in second.stderr
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()


def test_diverged_training_says_so_and_keeps_the_last_checkpoint(micro_config, tmp_path):
    out = tmp_path / "diverged"
    result = moesaic("supernet", micro_config, "--out", out, "supernet.learning_rate=1e12", "supernet.clip_norm=1e12")
    assert result.returncode == 1
    assert "diverged at step" in result.stderr
    assert "lower learning_rate" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_disk_that_fills_up_ends_in_one_message_and_damages_nothing(micro_config, tmp_path):
    out = tmp_path / "full"
    steps = ["supernet.steps=400", "supernet.checkpoint_every=5"]
    process = start("supernet", micro_config, "--out", out, *steps)
    interrupt_when(process, (out / "supernet" / "checkpoint.safetensors").exists, signal.SIGKILL)
    good = (out / "supernet" / "checkpoint.safetensors").read_bytes()
    # A limit on the size of files fails a write in the middle of a checkpoint just as a full disk does.
    result = moesaic_apart("supernet", micro_config, "--out", out, *steps, file_size_limit=len(good) // 2)
    assert result.returncode == 2
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr
    assert (out / "supernet" / "checkpoint.safetensors").read_bytes() == good
    assert not list((out / "supernet").glob(".*.tmp"))


def test_a_run_in_bfloat16(micro_config, tmp_path):
    result = moesaic("run", micro_config, "--out", tmp_path / "half", "device.dtype=bfloat16", "search.trials=10")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "half" / "summary.json").read_text())
    assert "bfloat16" in summary["device"]
    assert 0 < summary["chosen"]["retrained"]["loss"] < 10
