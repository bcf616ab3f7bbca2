"""The GPU benchmark of the kernels; tests of the hour with a GPU run it in small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "experiments/kernels/gpu.py"


def test_without_a_gpu_it_says_so() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=hidden, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "no CUDA device; --smoke shows that the script works\n")
