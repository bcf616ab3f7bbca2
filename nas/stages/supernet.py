"""Stage supernet: train the weights that every architecture shares, and see how its threshold routers behave."""

from __future__ import annotations

from dataclasses import replace

import torch

from nas.config import Config
from nas.costs.probe import autocast
from nas.costs.use import Occupancy
from nas.data import Corpus
from nas.device import Device
from nas.retrain import train_settings
from nas.stages.run import Run
from search_spaces import FeedForward, Router, SearchSpace
from search_spaces.files import write_json
from supernet import Sandwich, TrainData, TrainSettings, Transformer, evaluate, train
from supernet.checkpoint import save_tensors
from supernet.train import CHECKPOINT

_OCCUPANCY_WINDOWS = 32


def run_supernet(run: Run) -> None:
    """Leaves ``model.safetensors``, ``occupancy.json``, ``evaluation.json`` and the training metrics."""
    with run.work("supernet") as stage:
        if stage is None:
            return
        config = run.config.supernet
        model, data, settings = supernet_training(run.config, run.space, run.corpus, run.device)
        with run.task("supernet") as task:

            def on_step(step: int, record: dict[str, float]) -> None:
                slices = f"  random slice {record['loss_random']:.3f}" if "loss_random" in record else ""
                task.update(step, config.steps, f"loss {record['loss']:.3f}{slices}")

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
    """What ``train`` needs for the supernet of ``config``: its initial weights, its slices and batches, its settings."""
    chosen, seed = config.supernet, config.seed
    torch.manual_seed(seed)
    model = Transformer(space.envelope, corpus.vocab_size, chosen.sharing, frozenset(chosen.own), space.widths)
    largest_first = round(chosen.largest_first * chosen.steps)
    sandwich = Sandwich(
        space,
        seed,
        chosen.random_slices,
        chosen.sampling,
        largest_first,
        chosen.steps,
        chosen.ends,
        chosen.anneal,
        chosen.staged,
    )
    data = TrainData(lambda step: corpus.batch("train", chosen.batch_size, seed, step), sandwich.slices)
    settings = replace(train_settings(chosen, device.bfloat16, chosen.distill), final_rate=chosen.final_rate)
    return model.to(device.torch_device), data, settings


def measure_occupancy(run: Run, model: Transformer) -> Occupancy:
    """The load of the experts, most loaded first, under every router in the space: the mean over the layers that can
    have it.

    Each is seen in a network like the largest one in which every layer that offers it has it; an architecture's
    own loads are measured when it is evaluated.
    """
    windows = run.windows("validation", _OCCUPANCY_WINDOWS)
    measured = {}
    with autocast(run.device):
        for experts, router in routers(run.space):
            architecture, positions = _with_router(run.space, experts, router)
            loads = evaluate(model, windows, architecture).loads
            ranked = [sorted(load.pairs_per_token, reverse=True) for i in positions if (load := loads[i]) is not None]
            measured[experts, router] = tuple(sum(shares) / len(ranked) for shares in zip(*ranked, strict=True))
    return Occupancy(measured)


def routers(space: SearchSpace) -> list[tuple[int, Router]]:
    """(number of experts, router) of every router that some layer offers."""
    return list(
        dict.fromkeys(
            (group.experts, router)
            for layer in space.layers
            for group in layer.groups
            for router in group.routers
            if router is not None
        )
    )


def _with_router(space: SearchSpace, experts: int, router: Router):
    """The largest network with ``router`` and ``experts`` middle-sized experts wherever that is offered, and where."""
    layers, positions = list(space.largest.decoder.layers), []
    for index, layer in enumerate(layers):
        group = space.layers[index].group(experts)
        if group is not None and router in group.routers:
            part = FeedForward((group.sizes[len(group.sizes) // 2],) * experts, router, group.shared_sizes[0])
            layers[index] = replace(layer, feed_forward=part)
            positions.append(index)
    return space.build(space.largest.decoder.width, tuple(layers)), positions
