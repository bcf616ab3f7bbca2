"""Compile every Triton kernel without a GPU; record registers, spills, shared memory and matrix instructions.

The production code runs with tensors on the CPU under a driver that only names its target, and each launch compiles
instead. So pointer alignment and constants are those of a real launch.
python experiments/kernels/compile.py --out experiments/kernels/compile_result.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # it is read when a kernel is defined

import torch
import triton
from rich.console import Console
from rich.table import Table
from rivals import Case
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from moesaic.kernels import ACTIVATIONS, Bank, ExpertLayout, gpu, sparse_ffn
from moesaic.kernels.gpu import tuning
from moesaic.kernels.workspace import ROW_TILES, row_tile

LIMITS = {80: 163, 90: 227}
"""KiB of shared memory that one program may use, by compute capability (CUDA C++ programming guide, table 23)."""
EXPERTS = 8


class Elsewhere:
    """A driver without a device, with the part of Triton's interface that compiling for ``target`` needs."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int, rows: dict[str, dict[str, Any]] | None, facts: dict[str, Any]) -> Iterator[None]:
    """Inside, every launch compiles for ``capability`` instead of running, and adds to ``rows`` unless that is None.

    A row's key is the compiled kernel's hash. A kernel that several layers share has the ``facts`` of the first.
    """
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel: Any = run(self, *args, grid=grid, warmup=True, **kwargs)
        if rows is not None and kernel.hash not in rows:
            tile = {name: kwargs[name] for name in ("BM", "BN", "BK") if name in kwargs}
            metadata = kernel.metadata
            launch = {"warps": metadata.num_warps, "stages": metadata.num_stages}
            name = self.fn.__name__ + ("_two" if kwargs.get("TWO") else "")
            found = resources(kernel, capability)
            rows[kernel.hash] = {"kernel": name, "sm": capability, **facts, **tile, **launch, **found}
        return kernel

    JITFunction.run = compile_only
    driver.set_active(Elsewhere(capability))  # pyright: ignore[reportArgumentType] (what a compilation asks of a driver)
    try:
        yield
    finally:
        JITFunction.run = run


def resources(kernel: Any, capability: int) -> dict[str, Any]:
    """Registers per thread, spills, KiB of shared memory, and the matrix instruction of a compiled kernel.

    A spill is an instruction that stores to or loads from local memory; a stack frame alone is not one.
    """
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        command = [str(tools / "cuobjdump"), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    instruction = next((name for name in ("HGMMA", "HMMA", "DMMA", "FFMA") if name in text), "none")
    return {
        "registers": found["REG"],
        "stack_bytes": found["STACK"] + found["LOCAL"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "shared_kib": round(kernel.metadata.shared / 1024, 1),
        "fits": kernel.metadata.shared <= LIMITS[capability] * 1024,
        "instruction": instruction,
    }


def passes(case: Case, bank_dtype: torch.dtype, up_bias: bool = False) -> None:
    """Routing, forward and backward of a layer in bfloat16, and a forward pass that keeps nothing."""
    neurons = sum(case.sizes)
    logits = torch.zeros(case.tokens, len(case.sizes), requires_grad=True)

    def parameter(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=bank_dtype, requires_grad=True)

    x = torch.zeros(case.tokens, case.width, dtype=torch.bfloat16, requires_grad=True)
    starts = tuple(sum(case.sizes[:i]) for i in range(len(case.sizes)))
    up, down = parameter(neurons, case.width), parameter(neurons, case.width)
    gate = parameter(neurons, case.width) if ACTIVATIONS[case.activation].gated else None
    bank = Bank(up, gate, down, parameter(neurons) if up_bias else None)

    def forward() -> torch.Tensor:
        routing = gpu.route(logits, max_experts=case.max_experts, threshold=case.threshold)
        return sparse_ffn(x, bank, ExpertLayout(starts, case.sizes), routing, case.activation, "triton")

    forward().backward(torch.zeros_like(x))
    with torch.no_grad():
        forward()


@contextmanager
def each_candidate(capability: int, rows: int) -> Iterator[Iterator[int]]:
    """An iterator whose step n leaves only candidate n in the table of tiles, for ``rows`` per tile."""
    os.environ["MOESAIC_AUTOTUNE"] = "0"
    table = tuning.AMPERE if capability < 90 else tuning.HOPPER
    everything = dict(table)

    def steps() -> Iterator[int]:
        for step in range(max(len(by_rows[rows]) for by_rows in everything.values())):
            tuning.tuned.cache_clear()
            for name, by_rows in everything.items():
                table[name] = {**by_rows, rows: [by_rows[rows][step % len(by_rows[rows])]]}
            yield step

    try:
        yield steps()
    finally:
        table.update(everything)
        tuning.tuned.cache_clear()


def compile_candidates(capability: int, case: Case) -> None:
    """Compile every candidate for a case into Triton's cache, where tuning on the device finds them."""
    rows = row_tile(case.tokens * case.max_experts, len(case.sizes))
    with each_candidate(capability, rows) as candidates, compiling(capability, None, {}):
        for _ in candidates:
            passes(case, torch.bfloat16)


def compile_all(capabilities: list[int], quick: bool) -> list[dict[str, Any]]:
    """Rows for each kernel. ``quick`` is limited to two activations, one with a bias, the first candidates and two row
    tiles."""
    rows: dict[str, dict[str, Any]] = {}
    layers = [("swiglu", False), ("gelu_tanh", True)] if quick else list(product(ACTIVATIONS, (False, True)))
    bank_dtypes = [torch.bfloat16] if quick else [torch.bfloat16, torch.float32]
    tiles = [16, 128] if quick else ROW_TILES
    for capability, tile, (activation, up_bias), dtype in product(capabilities, tiles, layers, bank_dtypes):
        case = Case("", "", tile * EXPERTS // 2, 512, (256,) * EXPERTS, 2, activation=activation)
        facts = {"activation": activation, "up_bias": up_bias, "bank": str(dtype).removeprefix("torch.")}
        with each_candidate(capability, tile) as candidates, compiling(capability, rows, facts):
            for step in candidates:
                if step == 0 or not quick:
                    passes(case, dtype, up_bias)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=sorted(LIMITS), choices=sorted(LIMITS))
    parser.add_argument("--quick", action="store_true", help="first candidates, bfloat16, two activations")
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    arguments = parser.parse_args()
    rows = compile_all(arguments.sm, arguments.quick)
    columns = list(max(rows, key=len))
    table = Table(*columns)
    for row in rows:
        style = "red" if row["spills"] or not row["fits"] else None
        table.add_row(*(str(row.get(name, "")) for name in columns), style=style)
    Console(width=160).print(table)
    if arguments.out:
        facts = {"date": datetime.date.today().isoformat(), "triton": triton.__version__, "torch": torch.__version__}
        lines = ",\n".join(json.dumps(row) for row in rows)
        arguments.out.write_text(f'{json.dumps(facts)[:-1]}, "rows": [\n{lines}\n]}}\n')
    sys.exit(any(row["spills"] or not row["fits"] for row in rows))


if __name__ == "__main__":
    main()
