"""Does it help a supernet to train its largest architecture alone at first? Same steps, seeds and data.

python experiments/supernet_start/run.py [--steps 400] [--seeds 2] > result.json
"""

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path
from random import Random

import torch

from nas.config import DataConfig, DeviceConfig
from nas.data import load_corpus
from nas.device import choose_device
from nas.summary import versions
from search_spaces import load_space, preset_source
from supernet import Sandwich, TrainData, TrainSettings, Transformer, evaluate, train


def one(space, corpus, device, seed: int, steps: int, share: float) -> dict:
    """Train one supernet; losses on validation text of its largest, smallest and 16 random members."""
    torch.manual_seed(seed)
    model = Transformer(space.envelope, corpus.vocab_size).to(device.torch_device)
    sandwich = Sandwich(space, seed, largest_first=round(share * steps))
    data = TrainData(lambda step: corpus.batch("train", 8, seed, step), sandwich.slices)
    settings = TrainSettings(steps, 3e-3, warmup_steps=min(50, steps // 2), checkpoint_every=steps)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, settings, Path(folder), "experiment")
    seconds = time.perf_counter() - start
    windows, rng = corpus.windows("validation", 96), Random(0)
    model.eval()
    members = [space.sample_balanced(rng) for _ in range(16)]
    losses = {
        "largest": evaluate(model, windows, space.largest).loss,
        "smallest": evaluate(model, windows, space.smallest).loss,
        "random": sum(evaluate(model, windows, a).loss for a in members) / len(members),
    }
    return {"largest_first": share, "seed": seed, "seconds": round(seconds, 1), **losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--space", default="small")
    arguments = parser.parse_args()
    device = choose_device(DeviceConfig())
    corpus = load_corpus(DataConfig(vocab_size=1024), "experiment")
    space = load_space(preset_source(arguments.space))
    rows = [
        one(space, corpus, device, seed, arguments.steps, share)
        for seed in range(arguments.seeds)
        for share in (0.0, 0.2, 0.4)
    ]
    facts = {"date": datetime.date.today().isoformat(), "device": str(device), "versions": versions()}
    print(json.dumps({**facts, "steps": arguments.steps, "space": arguments.space, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
