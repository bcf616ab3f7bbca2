"""The command line: what it prints, and that bad input ends in one message and exit code 2."""

import json
import re
import subprocess
import sys

import pytest
import torch

from moesaic.nas import __version__
from moesaic.nas.config import load_config
from moesaic.search_spaces import load_space, preset_source
from tests.nas.command import moesaic


def test_help_does_not_import_torch():
    code = "import sys; sys.argv = ['moesaic', '--help']\nfrom moesaic.nas.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'optuna' not in sys.modules and 'pydantic' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for command in (
        "run",
        "plan",
        "init",
        "cost",
        "supernet",
        "latency",
        "search",
        "fidelity",
        "export",
        "retrain",
        "report",
        "doctor",
    ):
        assert f" {command} " in result.stdout


def test_version():
    assert moesaic("--version").stdout.strip() == f"moesaic {__version__}"


def test_init_writes_a_configuration_that_is_valid_and_never_overwrites(tmp_path):
    path = tmp_path / "my run.yaml"
    assert moesaic("init", path).returncode == 0
    assert load_config(path).config.name == "my-run"
    again = moesaic("init", path)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_cost_prices_an_architecture(tmp_path):
    path = tmp_path / "architecture.yaml"
    path.write_text(load_space(preset_source("tiny")).largest.to_yaml())
    table = moesaic("cost", path)
    assert table.returncode == 0, table.stderr
    assert "FLOPs per token" in table.stdout
    data = json.loads(moesaic("cost", path, "--json").stdout)
    assert data["expected"]["parameters"] > 0
    assert data["measured_latency_ms"] > 0
    total = sum(sum(layer.values()) for layer in data["flops_per_layer"].values()) + data["flops_vocabulary"]
    assert total == pytest.approx(data["expected"]["flops"])


def test_an_export_is_counted_beside_its_closed_form(quick_run):
    data = json.loads(moesaic("cost", quick_run / "exports" / "best", "--count", "--json").stdout)
    assert data["context"]["vocab_size"] == 300
    assert [row["counter"] for row in data["counted"]] == ["closed form", "torch FlopCounterMode", "fvcore"]
    assert len({round(row["flops"]) for row in data["counted"]}) == 1
    wrong = moesaic("cost", quick_run / "exports" / "best", "--vocab-size", 7)
    assert wrong.returncode == 2
    assert "its own vocabulary" in wrong.stderr


def test_plan_trains_and_times_nothing_and_tells_all(micro_config, tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    result = moesaic("plan", micro_config, "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["cardinality"] == load_space(preset_source("tiny")).cardinality
    assert set(plan["costs"]) == {"flops", "parameters", "active_parameters", "memory"}
    assert 0 < plan["share_inside"] <= 1
    assert (plan["seconds"], plan["latency_error"], plan["unchecked"]) == ({}, None, [])
    assert not (tmp_path / "cache" / "latency").exists()
    text = moesaic("plan", micro_config, "budget.latency=50%")
    assert text.returncode == 0, text.stderr
    assert "can be met" in text.stdout
    assert "latency line is not checked: add --latency" in " ".join(text.stdout.split())


def test_plan_times_the_machine_where_it_is_asked_to(micro_config):
    result = moesaic("plan", micro_config, "--latency", "--json", "budget.latency=90%", "latency.models=8")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert set(plan["costs"]) == {"flops", "latency", "parameters", "active_parameters", "memory"}
    assert set(plan["seconds"]) == {"supernet", "search", "fidelity", "retrain"}
    assert min(plan["seconds"][stage] for stage in ("supernet", "search", "retrain")) > 0
    assert plan["latency_error"] > 0


def test_plan_of_an_impossible_budget_says_what_can_be_reached(micro_config):
    result = moesaic("plan", micro_config, "budget.flops=1 kFLOPs")
    assert result.returncode == 2
    words = " ".join(result.stdout.split())
    assert "cannot be met" in words
    assert "flops binds" in words
    assert "Traceback" not in result.stderr


def test_a_run_with_an_impossible_budget_stops_before_training(micro_config, tmp_path):
    result = moesaic("run", micro_config, "--out", tmp_path / "run", "budget.parameters=10")
    assert result.returncode == 2
    assert "parameters binds" in result.stderr
    assert not (tmp_path / "run" / "supernet").exists()


def test_doctor_names_versions_and_device():
    result = moesaic("doctor")
    assert "torch" in result.stdout
    assert "triton" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "missing.yaml"], "no such file"),
        (["run", "."], "is a directory"),
        (["retrain", "."], "not an exported model"),
        (["cost", "missing.yaml"], "no such file"),
    ],
)
def test_wrong_paths_are_one_message(arguments, words):
    result = moesaic(*arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["search.smapler=random"], "nearest: sampler"),
        (["data.files=[/nowhere/at/all.txt]"], "no such file"),
        (["data.sequence_length=100000"], "shorter than the context"),
        (["device.device=cuda"], "no CUDA device|unknown"),
        (["device.threads=9999"], "more threads than processors"),
    ],
)
def test_bad_settings_are_one_message(micro_config, tmp_path, overrides, words):
    if torch.cuda.is_available() and "device.device=cuda" in overrides:
        overrides = ["device.device=tpu"]
        words = "not one of"
    result = moesaic("supernet", micro_config, "--out", tmp_path / "run", *overrides)
    assert result.returncode == 2
    assert re.search(words, result.stderr)
    assert "Traceback" not in result.stderr


def test_an_output_directory_that_cannot_be_written_is_one_message(micro_config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = moesaic("run", micro_config, "--out", tmp_path / "file" / "run")
    assert result.returncode == 2
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_architecture_outside_the_rules_is_one_message(tmp_path):
    path = tmp_path / "architecture.yaml"
    path.write_text(load_space(preset_source("tiny")).largest.to_yaml().replace("kv_heads: 2", "kv_heads: 5", 1))
    result = moesaic("cost", path)
    assert result.returncode == 2
    assert "kv_heads must divide heads" in result.stderr
    assert "architecture.yaml:" in result.stderr
