"""How many architectures are priced per second on one core (FLOPs, parameters, memory), without training any.

python experiments/pricing/run.py --out experiments/pricing/result.json
"""

import argparse
import datetime
import time
from pathlib import Path
from random import Random

from moesaic.nas.context import Context
from moesaic.nas.costs.price import Pricer
from moesaic.nas.device import processor_name
from moesaic.nas.report.summary import versions
from moesaic.search_spaces import load_space, preset_source
from moesaic.search_spaces.files import write_json

SEED = 0
COUNT = 5000


def priced_per_second() -> float:
    """Of the processor's time, with a new ``Pricer``."""
    rng, pricer = Random(SEED), Pricer(Context(1024, 128, 8))
    space = load_space(preset_source("small"))
    found = [space.sample_balanced(rng) for _ in range(COUNT)]
    start = time.process_time()
    for architecture in found:
        pricer.expected(architecture)
    return COUNT / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("result.json"))
    out = parser.parse_args().out
    result = round(priced_per_second())
    facts = {"date": datetime.date.today().isoformat(), "device": processor_name(), "versions": versions()}
    write_json(out, {**facts, "seed": SEED, "architectures": COUNT, "priced_per_second": result})
    print(f"{result} architectures per second")


if __name__ == "__main__":
    main()
