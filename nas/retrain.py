"""Training one architecture to be used: from scratch or from inherited weights, resumable, judged on the test split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nas.config import RetrainConfig, TrainingConfig
from nas.costs.probe import autocast
from nas.data import Corpus
from nas.device import Device
from search_spaces import Architecture
from supernet import Evaluation, TrainData, TrainSettings, Transformer, evaluate, train
from supernet.checkpoint import load_tensors, load_weights, save_tensors
from supernet.train import CHECKPOINT


@dataclass(frozen=True)
class Retrained:
    """A trained model on the device, in evaluation mode, with its evaluation on the test split."""

    model: Transformer
    evaluation: Evaluation


def retrain(
    architecture: Architecture,
    config: RetrainConfig,
    corpus: Corpus,
    device: Device,
    seed: int,
    directory: Path,
    identity: str,
    inherited: Transformer | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, record: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Retrained:
    """Train ``architecture`` in ``directory``, which receives metrics, a checkpoint, and ``model.safetensors``.

    Models with the same seed see the same batches in the same order. A finished directory with the same
    ``identity`` is loaded instead of trained again.

    Raises
    ------
    StageFailed, Interrupted, MoesaicError : as ``supernet.train``.
    """
    torch.manual_seed(seed)
    model = Transformer(architecture, corpus.vocab_size)
    if inherited is not None:
        model.load_state_dict(inherited.state_dict())
    model = model.to(device.torch_device)
    weights = directory / "model.safetensors"
    tensors, metadata = load_tensors(weights) if weights.exists() else ({}, {})
    if metadata.get("identity") == identity:
        load_weights(model, tensors, str(weights))
    else:
        data = TrainData(lambda step: corpus.batch("train", config.batch_size, seed, step), lambda step: [architecture])
        settings = train_settings(config, device.bfloat16, distill=False)
        train(model, data, settings, directory, identity, on_step, should_stop)
        save_tensors(weights, dict(model.named_parameters()), {"identity": identity})
        (directory / CHECKPOINT).unlink(missing_ok=True)
    model.eval()
    with autocast(device):
        evaluation = evaluate(model, corpus.windows("test", config.evaluation_windows))
    return Retrained(model, evaluation)


def train_settings(config: TrainingConfig, bfloat16: bool, distill: bool) -> TrainSettings:
    return TrainSettings(
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup_steps=min(config.warmup_steps, config.steps // 2),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        balance_weight=config.balance_weight,
        distill=distill,
        bfloat16=bfloat16,
        checkpoint_every=config.checkpoint_every,
    )


def loss_figures(corpus: Corpus, evaluation: Evaluation) -> dict[str, Any]:
    """Loss on the test split in every unit that people compare."""
    return {
        "loss": evaluation.loss,
        "standard_error": evaluation.standard_error,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": corpus.bits_per_byte("test", evaluation.loss),
        "tokens": evaluation.tokens,
    }
