"""Stage supernet: train the weights that every architecture shares, and see how its threshold routers behave."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import torch

from nas.config import Config
from nas.costs.probe import autocast
from nas.costs.use import Occupancy
from nas.data import Corpus
from nas.device import Device
from nas.retrain import train_settings
from nas.stages.run import Run
from search_spaces import Architecture, FeedForward, Router, SearchSpace
from search_spaces.files import write_json
from supernet import SliceSampler, TrainData, TrainSettings, Transformer, evaluate, train
from supernet.checkpoint import save_tensors
from supernet.train import CHECKPOINT

_OCCUPANCY_WINDOWS, _OCCUPANCY_MEMBERS = 16, 96


def run_supernet(run: Run) -> None:
    """Leaves ``model.safetensors``, ``occupancy.json``, ``evaluation.json`` and the training metrics."""
    with run.work("supernet") as stage:
        if stage is None:
            return
        config = run.config.supernet
        model, data, settings = supernet_training(run.config, run.space, run.corpus, run.device)
        with run.task("supernet") as task:

            def on_step(step: int, record: dict[str, float]) -> None:
                task.update(step, config.steps, f"loss {record['loss']:.3f}")

            train(model, data, settings, stage.path, stage.fingerprint, on_step, run.should_stop)
        model.eval()
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


def supernet_training(
    config: Config, space: SearchSpace, corpus: Corpus, device: Device
) -> tuple[Transformer, TrainData, TrainSettings]:
    """What ``train`` needs for the supernet of ``config``: initial weights, slices and batches, settings."""
    chosen, seed = config.supernet, config.seed
    torch.manual_seed(seed)
    model = Transformer(space.envelope, corpus.vocab_size, chosen.sharing).to(device.torch_device)
    largest_first = round(chosen.largest_first * chosen.steps)
    sampler = SliceSampler(space, seed, chosen.random_slices, chosen.sampling, largest_first)
    data = TrainData(lambda step: corpus.batch("train", chosen.batch_size, seed, step), sampler.slices)
    return model, data, train_settings(chosen, device.bfloat16)


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
