"""Stage supernet: train the weights that every architecture shares, and see how its threshold routers behave."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np

from moesaic.nas.costs.latency.probe import autocast
from moesaic.nas.costs.use import Occupancy
from moesaic.nas.stages.run import Run
from moesaic.nas.training.recipe import supernet_job, supernet_training
from moesaic.nas.training.workers import Workers
from moesaic.search_spaces import Architecture, FeedForward, Router, SearchSpace
from moesaic.search_spaces.files import write_json
from moesaic.supernet import Transformer, evaluate
from moesaic.supernet.checkpoint import save_tensors
from moesaic.supernet.train import CHECKPOINT

_OCCUPANCY_WINDOWS, _OCCUPANCY_MEMBERS = 16, 96


def run_supernet(run: Run) -> None:
    """Leaves ``model.safetensors``, ``occupancy.json``, ``evaluation.json`` and the training metrics."""
    with run.work("supernet") as stage:
        if stage is None:
            return
        config = run.config.supernet
        training = supernet_training(run.config, run.space, run.corpus, run.device)
        with run.task("supernet") as task:

            def on_step(step: int, record: dict[str, float]) -> None:
                task.update(step, config.steps, f"loss {record['loss']:.3f}")

            Workers(run.config.train, run.reporter.say).train(
                training,
                supernet_job(run.config),
                run.corpus,
                run.device,
                stage.path,
                stage.fingerprint,
                on_step,
                run.should_stop,
            )
        model = training[0].eval()
        occupancy = measure_occupancy(run, model)
        write_json(stage.path / "occupancy.json", occupancy.to_rows())
        windows = run.windows("validation", run.config.search.evaluation_windows)
        with autocast(run.device):
            losses = {
                name: evaluate(model, windows, a).loss
                for name, a in (("largest", run.space.largest), ("smallest", run.space.smallest))
            }
        write_json(stage.path / "evaluation.json", losses)
        save_tensors(stage.path / "model.safetensors", dict(model.named_parameters()), {"identity": stage.fingerprint})
        (stage.path / CHECKPOINT).unlink(missing_ok=True)  # three times the model's size, and of no more use


def measure_occupancy(run: Run, model: Transformer) -> Occupancy:
    """The load of the experts under every router in the space, layer by layer: the mean over random members that have
    it there, and over one like the largest in which every layer that offers it has it."""
    windows, rng = run.windows("validation", _OCCUPANCY_WINDOWS), Random(f"{run.config.seed}/occupancy")
    hosts = dict.fromkeys(_with_router(run.space, experts, router) for _, experts, router in routers(run.space))
    hosts |= dict.fromkeys(run.space.sample_balanced(rng) for _ in range(_OCCUPANCY_MEMBERS))
    seen: dict[tuple[int, int, Router], list[tuple[float, ...]]] = {}
    with autocast(run.device):
        for host in hosts:
            loads = evaluate(model, windows, host).loads
            for index, (layer, load) in enumerate(zip(host.decoder.layers, loads, strict=True)):
                part = layer.feed_forward
                if part.router is not None and load is not None:
                    seen.setdefault((index, part.experts, part.router), []).append(load.pairs_per_token)
    return Occupancy({key: tuple(np.mean(rows, axis=0).tolist()) for key, rows in seen.items()})


def routers(space: SearchSpace) -> list[tuple[int, int, Router]]:
    """(layer, number of experts, router) of every router that a layer offers."""
    return [
        (index, group.experts, router)
        for index, layer in enumerate(space.layers)
        for group in layer.groups
        for router in group.routers
        if router is not None
    ]


def _with_router(space: SearchSpace, experts: int, router: Router) -> Architecture:
    """The largest network with ``router`` and ``experts`` middle-sized experts wherever that is offered."""
    layers = list(space.largest.decoder.layers)
    for index, layer in enumerate(layers):
        group = space.layers[index].group(experts)
        if group is not None and router in group.routers:
            part = FeedForward((group.sizes[len(group.sizes) // 2],) * experts, router, group.shared_sizes[0])
            layers[index] = replace(layer, feed_forward=part)
    return space.build(space.largest.decoder.width, tuple(layers))
