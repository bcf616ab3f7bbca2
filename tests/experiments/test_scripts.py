"""What all scripts share, and those that have no test file of their own, each in its smallest form."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from experiments import common
from experiments.latency import large
from experiments.latency import run as latency
from experiments.pricing import run as pricing
from moesaic import Context, MoesaicError, read_value
from moesaic.search_spaces import load_space, preset_source

ROOT = Path(__file__).parents[2]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "experiments").rglob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8") and "kernels" not in path.parts
]


@pytest.mark.parametrize("name", MODULES)
def test_every_script_says_how_it_is_called(name, monkeypatch, capsys):
    module = import_module(name)
    assert f"python -m {name}" in module.__doc__
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert f"python -m {name}" in capsys.readouterr().out


def test_a_script_runs_as_a_module_from_the_root(tmp_path):
    command = [sys.executable, "-m", "experiments.headline.run", "summary", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == MoesaicError.exit_code
    assert "no models are chosen yet" in done.stderr
    assert "Traceback" not in done.stderr


def test_jobs_come_back_by_their_keys_with_what_they_raised():
    jobs = {"eight": (2, 3), "wrong": (2, "x")}
    ended = dict(common.in_processes(pow, jobs, lanes=2))
    assert ended["eight"].result() == 8
    assert isinstance(ended["wrong"].exception(), TypeError)


def test_rows_are_read_as_they_were_appended(tmp_path):
    assert common.read_rows(tmp_path / "rows.jsonl") == []
    for number in range(3):
        common.append_row(tmp_path / "rows.jsonl", {"number": number})
    assert common.read_rows(tmp_path / "rows.jsonl") == [{"number": number} for number in range(3)]


def test_architectures_are_priced(tmp_path, monkeypatch):
    monkeypatch.setattr(pricing, "COUNT", 50)
    monkeypatch.setattr(pricing, "MEASURED", 3)
    monkeypatch.setattr(sys, "argv", ["pricing", "--out", str(tmp_path / "result.json")])
    pricing.main()
    result = read_value(tmp_path / "result.json", dict)
    assert result["priced_per_second"] > 100
    assert [row["dtype"] for row in result["measured_over_priced_memory"]] == ["float32", "bfloat16"] * 2


def test_the_committed_memory_is_within_its_worst_case_and_near_its_price():
    for row in read_value(pricing.HERE / "result.json", dict)["measured_over_priced_memory"]:
        assert row["worst_case"]["most"] <= 1
        assert 0.85 <= row["counted_load"]["least"] <= row["counted_load"]["most"] <= 1


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_predictor_is_judged_on_new_models(tmp_path, monkeypatch, phase):
    monkeypatch.setattr(latency, "HERE", tmp_path)
    monkeypatch.setattr(latency, "CONTEXTS", {phase: Context(64, 16, 2, phase=phase)})
    monkeypatch.setattr(latency, "CALIBRATED", 16)
    monkeypatch.setattr(latency, "MODELS", 6)
    monkeypatch.setattr(sys, "argv", ["latency", phase, "--rounds", "3"])
    latency.main()
    result = read_value(tmp_path / f"{phase}.json", dict)
    assert result["phase"] == phase
    assert len(result["rows"]) == 6
    assert 0 < result["new_models"]["predictor"]["mape"] < 5
    assert len(result["baselines"]) == 4


def test_a_limited_calibration_is_judged_on_whole_models(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "HERE", tmp_path)
    monkeypatch.setattr(large, "SPACE", load_space(preset_source("tiny")))
    monkeypatch.setattr(large, "CONTEXT", Context(64, 16, 2))
    monkeypatch.setattr(sys, "argv", ["large", "--limit", "0.01", "--models", "4"])
    large.main()
    result = read_value(tmp_path / "large.json", dict)
    assert result["calibration"]["shallow"] >= 20
    assert len(result["rows"]) == result["new_models"]["count"] == 4


def test_the_committed_latency_results_are_of_the_models_that_the_script_draws():
    for phase in latency.CONTEXTS:
        result = read_value(latency.HERE / f"{phase}.json", dict)
        new = latency.new_models(result["seed"])
        assert [a.fingerprint for a in new] == [row["fingerprint"] for row in result["rows"]]
        measured, predicted = (
            np.array([row[key] for row in result["rows"]]) for key in ("measured_ms", "predicted_ms")
        )
        assert np.abs(predicted / measured - 1).mean() == pytest.approx(result["new_models"]["predictor"]["mape"])
