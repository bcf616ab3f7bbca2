"""What a training of a run consists of, made in this process or, from a job in plain JSON, in any other."""

from __future__ import annotations

from typing import Any

import torch

from moesaic.nas.config import Config, RetrainConfig, TrainingConfig
from moesaic.nas.data import Corpus
from moesaic.nas.device import Device
from moesaic.search_spaces import Architecture, SearchSpace, load_space
from moesaic.search_spaces.yaml_source import YamlSource
from moesaic.supernet import SliceSampler, TrainData, TrainSettings, Transformer

Training = tuple[Transformer, TrainData, TrainSettings]
"""What ``supernet.train`` needs: a model with its initial weights, batches and slices, settings."""
Job = dict[str, Any]
"""Of which model a training is, and by which configuration: values that JSON can hold."""


def supernet_training(config: Config, space: SearchSpace, corpus: Corpus, device: Device) -> Training:
    """That of the supernet of ``config``."""
    chosen, seed = config.supernet, config.seed
    torch.manual_seed(seed)
    model = Transformer(space.envelope, corpus.vocab_size, chosen.sharing).to(device.torch_device)
    largest_first = round(chosen.largest_first * chosen.steps)
    sampler = SliceSampler(space, seed, chosen.random_slices, chosen.sampling, largest_first)
    data = TrainData(lambda step: corpus.batch("train", chosen.batch_size, seed, step), sampler.slices)
    return model, data, train_settings(chosen, device.bfloat16)


def single_training(
    architecture: Architecture, config: RetrainConfig, corpus: Corpus, device: Device, seed: int
) -> Training:
    """That of one model from scratch. Models with the same seed see the same batches in the same order."""
    torch.manual_seed(seed)
    model = Transformer(architecture, corpus.vocab_size).to(device.torch_device)
    data = TrainData(lambda step: corpus.batch("train", config.batch_size, seed, step), lambda step: [architecture])
    return model, data, train_settings(config, device.bfloat16)


def supernet_job(config: Config) -> Job:
    return {"supernet": config.model_dump(mode="json")}


def single_job(architecture: Architecture, config: RetrainConfig, seed: int) -> Job:
    return {"single": {"architecture": architecture.to_dict(), "config": config.model_dump(mode="json"), "seed": seed}}


def training_of(job: Job, corpus: Corpus, device: Device) -> Training:
    """The training that ``job`` describes."""
    if "supernet" in job:
        config = Config.model_validate(job["supernet"])
        return supernet_training(config, load_space(YamlSource("space", config.space)), corpus, device)
    single = job["single"]
    architecture = Architecture.from_dict(single["architecture"])
    return single_training(architecture, RetrainConfig.model_validate(single["config"]), corpus, device, single["seed"])


def train_settings(config: TrainingConfig, bfloat16: bool) -> TrainSettings:
    return TrainSettings(
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup_steps=min(config.warmup_steps, config.steps // 2),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        balance_weight=config.balance_weight,
        bfloat16=bfloat16,
        checkpoint_every=config.checkpoint_every,
    )
