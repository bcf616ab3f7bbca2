"""How many architectures are priced per second on one core (FLOPs, parameters, memory), without training any.

python -m experiments.pricing.run [--out FILE]
"""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

from experiments.common import facts, parser_of, run_script
from moesaic import Context, DeviceConfig, Pricer, choose_device, write_value
from moesaic.search_spaces import load_space, preset_source

SEED = 0
COUNT = 5000


def priced_per_second() -> float:
    """Architectures per second of processor time, with a new ``Pricer``."""
    rng, pricer = Random(SEED), Pricer(Context(1024, 128, 8))
    space = load_space(preset_source("small"))
    found = [space.sample_balanced(rng) for _ in range(COUNT)]
    start = time.process_time()
    for architecture in found:
        pricer.expected(architecture)
    return COUNT / (time.process_time() - start)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("result.json"))
    out = parser.parse_args().out
    result = round(priced_per_second())
    device = choose_device(DeviceConfig(device="cpu", threads=1))
    write_value(out, {**facts(device), "seed": SEED, "architectures": COUNT, "priced_per_second": result})
    print(f"{result} architectures per second")


if __name__ == "__main__":
    run_script(main)
