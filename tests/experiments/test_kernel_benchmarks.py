"""The GPU benchmark runs from end to end without a GPU: tiny shapes in Triton's interpreter, times without meaning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "experiments/kernels/gpu.py"


def test_the_gpu_benchmark_checks_times_and_judges_every_case(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert [row["case"] for row in result["rows"]] == ["uniform", "mixed", "threshold"]
    for row in result["rows"]:
        assert {"moesaic", "dense", "expert loop", "padded bmm", "torch grouped_mm"} <= row["rivals"].keys()
        assert all(times["forward_ms"] > 0 and times["step_ms"] > 0 for times in row["rivals"].values())
    for errors in result["errors"].values():  # in float32 every way to compute the layer is the same layer
        assert max(errors.values()) < 1e-4
    judged = {goal["goal"]: goal["met"] for goal in result["targets"]}
    assert judged["equal sizes: times faster than torch grouped_mm, forward_ms"] is not None
    assert judged["equal sizes: times faster than liger, forward_ms"] is None  # not installed: not claimed


def test_without_a_gpu_it_says_so() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=hidden, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "no CUDA device; --smoke shows that the script works\n")
