"""How long should torch's OpenMP threads spin? Steps per second of a training, alone and beside one and two busy jobs.

python -m experiments.spin.run [--seconds 6] [--rounds 3]

The training is the quickstart's largest architecture, with all processors. A job multiplies matrices in two threads.
Settings take turns within a round. Run nothing else beside it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.common import facts, parser_of, run_script
from moesaic import DeviceConfig, choose_device, load_config, write_value

HERE = Path(__file__).parent
SETTINGS: dict[str, dict[str, str]] = {
    "GOMP_SPINCOUNT=300000": {"GOMP_SPINCOUNT": "300000"},  # what libgomp does by default
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
JOB = "import torch; a = torch.randn(512, 512); torch.set_num_threads(2)\nwhile True: a @ a"


def train(seconds: float) -> float:
    """Steps per second of forward, backward and optimiser, after two steps of warm-up."""
    import torch
    import torch.nn.functional as F

    from moesaic import Transformer

    loaded = load_config(HERE.parent / "quickstart.yaml")
    choose_device(DeviceConfig(device="cpu"))
    config = loaded.config
    model = Transformer(loaded.space.largest, config.data.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, config.data.vocab_size, (config.supernet.batch_size, config.data.sequence_length + 1))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()

    step()
    steps, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        step()
        steps += 1
    return steps / spent


@contextmanager
def jobs(number: int) -> Iterator[None]:
    """``number`` busy programs with torch's own defaults, as any other program has them."""
    environment = _without_spin()
    running = [subprocess.Popen([sys.executable, "-c", JOB], env=environment) for _ in range(number)]
    try:
        time.sleep(3 if number else 0)  # until they have imported torch
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def _without_spin() -> dict[str, str]:
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    return {key: value for key, value in os.environ.items() if key not in ours}


def measure(setting: dict[str, str], seconds: float) -> float:
    environment = _without_spin() | setting  # moesaic leaves alone what is set
    command = [sys.executable, "-m", "experiments.spin.run", "--one", "--seconds", str(seconds)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    parser.add_argument("--one", action="store_true", help="measure once in this process and print steps per second")
    arguments = parser.parse_args()
    if arguments.one:
        print(train(arguments.seconds))
        return
    found: dict[str, dict[str, list[float]]] = {name: {} for name in SETTINGS}
    for _ in range(arguments.rounds):
        for number in range(3):
            with jobs(number):
                for name, setting in SETTINGS.items():
                    found[name].setdefault(str(number), []).append(measure(setting, arguments.seconds))
                    print(f"{number} jobs, {name}: {found[name][str(number)][-1]:.2f} steps per second", flush=True)
    medians = {name: {n: round(statistics.median(v), 2) for n, v in row.items()} for name, row in found.items()}
    result = facts(choose_device(DeviceConfig(device="cpu"))) | {
        "unit": "steps per second",
        "medians_by_jobs_beside": medians,
        "all": found,
    }
    write_value(arguments.out, result)


if __name__ == "__main__":
    run_script(main)
