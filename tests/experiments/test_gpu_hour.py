"""The hour with a GPU: every step in small on the CPU, without Ray and Optuna; what is stopped or fails runs again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu.run import ROOT, STEPS, Step, go


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a small hour on a machine without Ray and Optuna."""
    folder = tmp_path_factory.mktemp("hour")
    for name in ("optuna", "ray"):
        missing = f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
        (folder / f"{name}.py").write_text(missing)
    command = [sys.executable, "-m", "experiments.gpu.run", "--small", "--minutes", "10"]
    command += ["--out", str(folder / "out"), "--work", str(folder / "work")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "MOESAIC_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("every step is done\n"), done.stdout[-3000:] + done.stderr[-1000:]
    return folder / "out"


def steps(out: Path) -> dict[str, dict[str, Any]]:
    return {row["step"]: row for row in json.loads((out / "steps.json").read_text())}


def test_every_step_ends_and_leaves_its_result(hour: Path) -> None:
    assert [row["state"] for row in steps(hour).values()] == ["done"] * len(STEPS)
    for name in ("checks.json", "kernels.json", "latency.json", "headline.json", "fidelity.jsonl"):
        assert (hour / name).stat().st_size > 0, name
    checks = json.loads((hour / "checks.json").read_text())
    assert checks["failed"] == [] and {row["dtype"] for row in checks["rows"]} == {"float32", "bfloat16"}
    assert "optuna is not installed" in (hour / "search.log").read_text()


def test_the_kernel_benchmark_checks_times_and_judges_every_case(hour: Path) -> None:
    result = json.loads((hour / "kernels.json").read_text())
    assert [row["case"] for row in result["rows"]] == ["uniform", "mixed", "threshold"]
    for row in result["rows"]:
        assert {"moesaic", "dense", "expert loop", "padded bmm", "torch grouped_mm"} <= row["rivals"].keys()
        assert all(times["forward_ms"] > 0 and times["step_ms"] > 0 for times in row["rivals"].values())
    for errors in result["errors"].values():  # in float32 every way to compute the layer is the same layer
        assert max(errors.values()) < 1e-4
    judged = {goal["goal"]: goal["met"] for goal in result["targets"]}
    assert judged["equal sizes: times faster than torch grouped_mm, forward_ms"] is not None
    assert judged["equal sizes: times faster than liger, forward_ms"] is None  # not installed: not claimed


def counted(tmp_path: Path, name: str, then: str) -> Step:
    """A step that counts its runs in a file, and then does ``then``."""
    code = f"import sys, time; open(r'{tmp_path / name}', 'a').write('x'); {then}"
    return Step(name, 1, f'-c "{code}"')


def test_what_failed_or_was_stopped_runs_again_and_what_is_done_does_not(tmp_path: Path) -> None:
    kinds = {"fine": "pass", "wrong": "sys.exit(3)", "long": "time.sleep(60)"}
    chosen = [counted(tmp_path, name, then) for name, then in kinds.items()]
    for call in (1, 2):
        rows = go(chosen, tmp_path, tmp_path, minutes=0.1, small=False, changes=())
        assert {row["step"]: row["state"] for row in rows} == {"fine": "done", "wrong": "failed", "long": "stopped"}
        assert {name: len((tmp_path / name).read_text()) for name in kinds} == {"fine": 1, "wrong": call, "long": call}


def test_changes_reach_the_stages_and_no_other_step(tmp_path: Path) -> None:
    for step in STEPS:
        arguments = step.arguments(tmp_path / "out", tmp_path / "work", False, ["data.files=x"])
        assert ("data.files=x" in arguments) == ("headline.yaml" in " ".join(arguments))
        assert not any(word.startswith(("OUT", "WORK")) for word in arguments)
