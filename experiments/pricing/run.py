"""How many architectures are priced per second on one core, and how near the priced memory is to what a pass allocates.

python -m experiments.pricing.run [--out FILE]
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random
from statistics import median

from experiments.common import Row, facts, parser_of, run_script
from moesaic import (
    Context,
    DeviceConfig,
    Pricer,
    activation_memory,
    choose_device,
    peak_activation_bytes,
    random_passes,
    write_value,
)
from moesaic.search_spaces import load_space, preset_source

HERE = Path(__file__).parent
SEED = 0
COUNT = 5000
MEASURED = 40
"""Architectures whose memory is measured, per phase and type."""


def priced_per_second() -> float:
    """Architectures per second of processor time, with a new ``Pricer``."""
    rng, pricer = Random(SEED), Pricer(Context(1024, 128, 8))
    space = load_space(preset_source("small"))
    found = [space.sample_balanced(rng) for _ in range(COUNT)]
    start = time.process_time()
    for architecture in found:
        pricer.expected(architecture)
    return COUNT / (time.process_time() - start)


def memory_ratios() -> list[Row]:
    """Measured over priced bytes of activations and cache: priced with the counted load, and in the worst case."""
    space, rows = load_space(preset_source("small")), []
    cpu = choose_device(DeviceConfig(device="cpu", threads=1))
    for phase, (dtype, size) in product(("prefill", "decode"), (("float32", 4), ("bfloat16", 2))):
        rng, context = Random(SEED), Context(2048, 128, 8, size, phase)
        counted, worst = [], []
        for _ in range(MEASURED):
            architecture = space.sample_balanced(rng)
            (one,) = random_passes([architecture], context, replace(cpu, dtype=dtype), SEED)
            weights = 4 * sum(parameter.numel() for parameter in one.model.parameters())
            measured = peak_activation_bytes(one)
            counted.append(measured / activation_memory(architecture, one.uses(), context))
            worst.append(measured / (Pricer(context).worst(architecture)["memory"] - weights))
        rows.append({"phase": phase, "dtype": dtype, "counted_load": _range(counted), "worst_case": _range(worst)})
    return rows


def _range(ratios: list[float]) -> Row:
    return {"least": round(min(ratios), 3), "median": round(median(ratios), 3), "most": round(max(ratios), 3)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    out = parser.parse_args().out
    device = choose_device(DeviceConfig(device="cpu", threads=1))
    speed, memory = round(priced_per_second()), memory_ratios()
    counts = {"seed": SEED, "architectures": COUNT, "priced_per_second": speed}
    write_value(out, {**facts(device), **counts, "memory_models": MEASURED, "measured_over_priced_memory": memory})
    print(f"{speed} architectures per second")
    for row in memory:
        print(row)


if __name__ == "__main__":
    run_script(main)
