"""How repeatable a stand-alone loss is, by initial weights and length of training. Two seeds each.

python -m experiments.fidelity.stability
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import torch

from experiments.common import Row, facts, parser_of, read_rows, run_script
from experiments.fidelity.truth import HERE, open_variant
from moesaic import Architecture, Run, Transformer, single_recipe, write_value
from moesaic.supernet import train

Start = Literal["0.02 everywhere", "this tool's"]
FOLDER = HERE / "small"
INITIAL_STEPS, LONG_STEPS, EVERY, WINDOWS = 300, 1600, 100, 512


def gpt2_weights(model: Transformer) -> None:
    """Normal(0, 0.02), divided by sqrt(2 L) where a layer writes to the residual stream (Radford et al. 2019)."""
    residual = 0.02 / (2 * len(model.architecture.layers)) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=residual if name.endswith((".o", ".down")) else 0.02)


def curve(run: Run, member: int, seed: int, steps: int, start: Start) -> Row:
    """Test loss of a member every ``EVERY`` steps of a training of ``steps``."""
    architecture = Architecture.from_dict(read_rows(FOLDER / "members.jsonl")[member]["architecture"])
    config = run.config.retrain.model_copy(update={"steps": steps})
    recipe = single_recipe(architecture, config, seed, run.device.bfloat16)
    model = recipe.weights(run.task)(architecture)
    if start == "0.02 everywhere":
        gpt2_weights(model)
    judge, losses = run.judge("test", WINDOWS, model), []

    def on_step(step: int, record: dict[str, float]) -> None:
        if step % EVERY == 0:
            losses.append(round(judge(architecture).loss, 4))

    with tempfile.TemporaryDirectory() as folder:
        train(model, recipe.data(run.task), recipe.settings, Path(folder), "stability", on_step)
    return {"start": start, "member": member, "seed": seed, "steps": steps, "losses": losses}


def main() -> None:
    parser_of(__doc__).parse_args()
    run = open_variant("small")
    old: Start = "0.02 everywhere"
    new: Start = "this tool's"
    rows = [curve(run, m, seed, INITIAL_STEPS, s) for s in (old, new) for m in (16, 21, 23) for seed in (0, 1)]
    rows += [curve(run, m, seed, LONG_STEPS, new) for m in (10, 11) for seed in (0, 1)]
    write_value(FOLDER / "stability.json", {**facts(run.device), "every": EVERY, "rows": rows})


if __name__ == "__main__":
    run_script(main)
