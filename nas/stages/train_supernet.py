"""Stage supernet: train the weights that all architectures share, or split those of a trained model; and measure the
load of the experts."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import numpy as np

from moesaic.nas.costs.use import Occupancy, OccupancyRow
from moesaic.nas.stages.directory import StageDirectory
from moesaic.nas.stages.run import SUPERNET, Run
from moesaic.nas.stages.split_model import split_model
from moesaic.nas.training.recipe import supernet_recipe
from moesaic.search_spaces import Architecture, FeedForward, Router, SearchSpace, Slot
from moesaic.search_spaces.files import write_json, write_value
from moesaic.supernet import Transformer
from moesaic.supernet.checkpoint import save_tensors
from moesaic.supernet.train import CHECKPOINT

_OCCUPANCY_WINDOWS, _OCCUPANCY_MEMBERS, _EVALUATION_WINDOWS = 16, 96, 128


def inputs(run: Run) -> dict[str, Any]:
    source = run.loaded.checkpoint
    how = "model" if source else "supernet"
    config = run.config.model_dump(mode="json", include={"seed", "data", "space", how})
    weights = {"weights": source.fingerprint} if source else {}
    return config | weights | {"corpus": run.task.fingerprint, "device": run.device.computing}


def passes(run: Run) -> float:
    config = run.config
    if config.model is not None:  # a pass, another one's worth of parts, and half a pass for each layer
        return config.model.calibration_windows * (2.0 + run.space.depth / 4)
    return 3.0 * config.supernet.steps * config.supernet.batch_size


def work(run: Run, directory: StageDirectory) -> None:
    """Writes ``model.safetensors``, ``occupancy.json``, ``evaluation.json``, and the training metrics or the scores of
    the parts of a trained model."""
    model, occupancy = split_model(run, directory) if run.loaded.checkpoint else _train(run, directory)
    write_value(directory.path / "occupancy.json", occupancy.rows(), list[OccupancyRow])
    judge = run.judge("validation", min(_EVALUATION_WINDOWS, run.config.search.evaluation_windows), model)
    ends = {"largest": run.space.largest, "smallest": run.space.smallest}
    write_json(directory.path / "evaluation.json", {name: judge(member).loss for name, member in ends.items()})
    weights = directory.path / SUPERNET
    save_tensors(weights, dict(model.named_parameters()), {"identity": directory.fingerprint})
    (directory.path / CHECKPOINT).unlink(missing_ok=True)  # three times the model's size


def _train(run: Run, directory: StageDirectory) -> tuple[Transformer, Occupancy]:
    recipe = supernet_recipe(run.config, run.space, run.device.bfloat16)
    with run.reporter.progress("supernet") as bar:

        def on_step(step: int, record: dict[str, float]) -> None:
            bar.update(step, recipe.settings.steps, f"loss {record['loss']:.3f}")

        model = run.trainer.train(recipe, directory.path, directory.fingerprint, on_step)
    return model, measure_occupancy(run, model)


def measure_occupancy(run: Run, model: Transformer) -> Occupancy:
    """The load of the experts under every router in the space, layer by layer. It is the mean over random members with
    that router there, and over the largest network with that router wherever it is offered."""
    judge, rng = run.judge("validation", _OCCUPANCY_WINDOWS, model), Random(f"{run.config.seed}/occupancy")
    hosts = dict.fromkeys(_with_router(run.space, experts, router) for _, experts, router in routers(run.space))
    hosts |= dict.fromkeys(run.space.sample_balanced(rng) for _ in range(_OCCUPANCY_MEMBERS))
    seen: dict[tuple[Slot, int, Router], list[tuple[float, ...]]] = {}
    for host in run.each("loads", list(hosts)):
        for (slot, layer), load in zip(host.layers.items(), judge(host).loads, strict=True):
            part = layer.feed_forward
            if part.router is not None and load is not None:
                seen.setdefault((slot, part.experts, part.router), []).append(load.pairs_per_token)
    return Occupancy({key: tuple(np.mean(rows, axis=0).tolist()) for key, rows in seen.items()})


def routers(space: SearchSpace) -> list[tuple[Slot, int, Router]]:
    """(slot, number of experts, router) of every router that a layer offers."""
    return [
        (slot, group.experts, router)
        for slot, layer in space.layers.items()
        for group in layer.groups
        for router in group.routers
        if router is not None
    ]


def _with_router(space: SearchSpace, experts: int, router: Router) -> Architecture:
    """The largest network, with ``router`` and ``experts`` middle-sized experts wherever the space offers that."""
    changed = {}
    for slot, layer in space.largest.layers.items():
        group = space.layers[slot].group(experts)
        if group is not None and router in group.routers:
            part = FeedForward((group.sizes[len(group.sizes) // 2],) * experts, router, group.shared_sizes[0])
            changed[slot] = replace(layer, feed_forward=part)
    return space.largest.with_layers(changed)
