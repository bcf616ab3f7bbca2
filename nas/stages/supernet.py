"""Stage supernet: train the weights that every architecture shares, and see how its threshold routers behave."""

from __future__ import annotations

from dataclasses import replace

import torch

from nas.costs.probe import autocast
from nas.costs.use import Occupancy
from nas.retrain import train_settings
from nas.stages.run import Run
from search_spaces import FeedForward, Router, SearchSpace
from search_spaces.files import write_json
from supernet import Sandwich, TrainData, Transformer, evaluate, train
from supernet.checkpoint import save_tensors
from supernet.train import CHECKPOINT

_OCCUPANCY_WINDOWS = 32


def run_supernet(run: Run) -> None:
    """Leaves ``model.safetensors``, ``occupancy.json``, ``evaluation.json`` and the training metrics."""
    with run.work("supernet") as stage:
        if stage is None:
            return
        config = run.config.supernet
        torch.manual_seed(run.config.seed)
        model = Transformer(run.space.envelope, run.corpus.vocab_size, config.sharing).to(run.device.torch_device)
        largest_first = round(config.largest_first * config.steps)
        sandwich = Sandwich(run.space, run.config.seed, config.random_slices, config.sampling, largest_first)
        data = TrainData(
            lambda step: run.corpus.batch("train", config.batch_size, run.config.seed, step), sandwich.slices
        )
        settings = train_settings(config, run.device.bfloat16, config.distill)
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
