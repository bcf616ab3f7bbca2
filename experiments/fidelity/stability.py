"""What makes a stand-alone loss repeatable: initial weights, and the length of training. Two seeds each.

python experiments/fidelity/stability.py > experiments/fidelity/small/stability.json
"""

from __future__ import annotations

import datetime
import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from truth import HERE, open_run, read_rows

from moesaic.nas.stages.run import Run
from moesaic.nas.training.recipe import train_settings
from moesaic.search_spaces import Architecture
from moesaic.supernet import TrainData, Transformer, evaluate, train

Start = Literal["0.02 everywhere", "this tool's"]
INITIAL_STEPS, LONG_STEPS, EVERY = 300, 1600, 100


def gpt2_weights(model: Transformer) -> None:
    """Normal(0, 0.02), smaller by sqrt(2 L) where a layer writes to the residual stream (Radford et al. 2019)."""
    residual = 0.02 / (2 * len(model.layers)) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=residual if name.endswith((".o", ".down")) else 0.02)


def curve(run: Run, member: int, seed: int, steps: int, start: Start) -> dict[str, Any]:
    """Test loss of a member every ``EVERY`` steps of a training of ``steps``."""
    architecture = Architecture.from_dict(read_rows(HERE / "small" / "members.jsonl")[member]["architecture"])
    config = run.config.retrain.model_copy(update={"steps": steps})
    torch.manual_seed(seed)
    model = Transformer(architecture, run.corpus.vocab_size)
    if start == "0.02 everywhere":
        gpt2_weights(model)
    windows, losses = run.windows("test", 512), []

    def on_step(step: int, record: dict[str, float]) -> None:
        if step % EVERY == 0:
            losses.append(round(evaluate(model, windows).loss, 4))

    data = TrainData(lambda step: run.corpus.batch("train", config.batch_size, seed, step), lambda step: [architecture])
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, train_settings(config, run.device.bfloat16), Path(folder), "stability", on_step)
    return {"start": start, "member": member, "seed": seed, "steps": steps, "losses": losses}


def main() -> None:
    run = open_run("small")
    old: Start = "0.02 everywhere"
    new: Start = "this tool's"
    rows = [curve(run, m, seed, INITIAL_STEPS, s) for s in (old, new) for m in (16, 21, 23) for seed in (0, 1)]
    rows += [curve(run, m, seed, LONG_STEPS, new) for m in (10, 11) for seed in (0, 1)]
    facts = {"date": datetime.date.today().isoformat(), "device": str(run.device), "every": EVERY}
    print(json.dumps({**facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
