"""What a sparse layer costs on this CPU beside a dense one of equal active FLOPs; how fast architectures are priced.

Interleaved: each round times the dense layer, then the sparse ones; ratios are of medians.
python experiments/cpu_layers/run.py > result.json
"""

import datetime
import json
import time
from random import Random
from statistics import median

import torch

from kernels import Bank, ExpertLayout, route, sparse_ffn
from nas.config import DeviceConfig
from nas.costs.analytic import Context
from nas.costs.price import Pricer
from nas.device import choose_device
from nas.summary import versions
from search_spaces import load_space, preset_source

CASES = [  # tokens, width, sizes of the experts, experts per token
    (1024, 128, (96,) * 8, 2),
    (2048, 512, (1024,) * 8, 2),
    (2048, 256, (256,) * 32, 2),
    (2048, 256, (1024, 512, 512, 256, 256, 128, 128, 64), 2),
]
ROUNDS = 15


def layer(tokens: int, width: int, sizes: tuple[int, ...], k: int):
    """A timed pass of the sparse layer and of a dense one of equal active FLOPs, forward or with backward."""
    torch.manual_seed(0)
    x = torch.randn(tokens, width, requires_grad=True)
    starts = tuple(sum(sizes[:i]) for i in range(len(sizes)))
    bank = Bank(
        torch.randn(sum(sizes), width, requires_grad=True), None, torch.randn(sum(sizes), width, requires_grad=True)
    )
    logits = torch.randn(tokens, len(sizes))
    load = route(logits, most=k).load / tokens
    active = round(sum(share * size for share, size in zip(load.tolist(), sizes, strict=True)))
    dense = Bank(torch.randn(active, width, requires_grad=True), None, torch.randn(active, width, requires_grad=True))

    def sparse(implementation: str):
        return sparse_ffn(x, bank, ExpertLayout(starts, sizes), route(logits, most=k), "relu", implementation)

    return {
        "dense": lambda: sparse_ffn(x, dense, ExpertLayout((0,), (active,)), None, "relu"),
        "segments": lambda: sparse("segments"),
        "reference": lambda: sparse("reference"),
    }


def milliseconds(run, backward: bool) -> float:
    start = time.perf_counter()
    if backward:
        run().sum().backward()
    else:
        with torch.no_grad():
            run()
    return (time.perf_counter() - start) * 1e3


def priced_per_second(count: int = 5000) -> float:
    rng, pricer = Random(0), Pricer(Context(1024, 128, 8))
    space = load_space(preset_source("small"))
    found = [space.sample_balanced(rng) for _ in range(count)]
    start = time.process_time()
    for architecture in found:
        pricer.expected(architecture)
    return count / (time.process_time() - start)


def main() -> None:
    device = choose_device(DeviceConfig(device="cpu"))
    rows = []
    for tokens, width, sizes, k in CASES:
        passes = layer(tokens, width, sizes, k)
        for backward in (False, True):
            times: dict[str, list[float]] = {name: [] for name in passes}
            for round_number in range(ROUNDS + 2):
                for name, run in passes.items():
                    elapsed = milliseconds(run, backward)
                    if round_number >= 2:
                        times[name].append(elapsed)
            medians = {name: median(values) for name, values in times.items()}
            rows.append(
                {
                    "tokens": tokens,
                    "width": width,
                    "experts": len(sizes),
                    "sizes": sorted(set(sizes)),
                    "k": k,
                    "pass": "forward+backward" if backward else "forward",
                    "dense_ms": round(medians["dense"], 3),
                    "ratio_segments": round(medians["segments"] / medians["dense"], 2),
                    "ratio_reference": round(medians["reference"] / medians["dense"], 2),
                }
            )
    facts = {"date": datetime.date.today().isoformat(), "device": str(device), "versions": versions()}
    print(json.dumps({**facts, "architectures_priced_per_second": round(priced_per_second()), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
