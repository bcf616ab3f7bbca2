"""Every Triton kernel, compiled ahead of time for Ampere and Hopper: nothing spills, shared memory suffices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from moesaic.kernels.gpu import expert_kernels as device
from moesaic.kernels.gpu import routing_kernels as routing_device

SCRIPT = Path(__file__).parents[2] / "experiments/kernels/compile.py"
CALLED_BY_OTHERS = "_"
PRODUCTS = {"hidden_product", "width_product", "width_product_two", "weight_backward"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the script finds for the first candidates. In a process of its own: there kernels are not interpreted."""
    folder = tmp_path_factory.mktemp("compile")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(folder / "rows.json")]
    done = subprocess.run(
        command, env={**environment, "TRITON_CACHE_DIR": str(folder)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((folder / "rows.json").read_text())["rows"]


def test_every_kernel_is_compiled_for_both_generations(rows: list[dict]) -> None:
    kernels = {
        name
        for module in (device, routing_device)
        for name, value in vars(module).items()
        if isinstance(value, (InterpretedFunction, JITFunction)) and not name.startswith(CALLED_BY_OTHERS)
    }
    for generation in (80, 90):
        assert kernels <= {row["kernel"] for row in rows if row["sm"] == generation}


def test_nothing_spills_and_shared_memory_suffices(rows: list[dict]) -> None:
    assert [row for row in rows if row["spills"] or not row["fits"]] == []


def test_products_use_the_matrix_units(rows: list[dict]) -> None:
    found = {(row["kernel"], row["sm"], row.get("BM")): row["instruction"] for row in rows if row["kernel"] in PRODUCTS}
    for (_, generation, row_tile), instruction in found.items():
        # wgmma needs tiles of 64 rows; smaller ones and Ampere use mma.sync.
        assert instruction == ("HGMMA" if generation == 90 and row_tile >= 64 else "HMMA")
