"""Training one architecture to be used: from scratch or from inherited weights, resumable, judged on the test split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.nas.config import RetrainConfig
from moesaic.nas.costs.latency.probe import autocast
from moesaic.nas.data import Corpus
from moesaic.nas.device import Device
from moesaic.nas.training.recipe import single_job, single_training
from moesaic.nas.training.workers import ONE, Workers
from moesaic.nas.trust.ranking import mean_interval
from moesaic.search_spaces import Architecture
from moesaic.supernet import Evaluation, Transformer, evaluate
from moesaic.supernet.checkpoint import load_tensors, load_weights, save_tensors
from moesaic.supernet.train import CHECKPOINT


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
    workers: Workers = ONE,
) -> Retrained:
    """Train ``architecture`` in ``directory``, which receives metrics, a checkpoint, and ``model.safetensors``.

    Models with the same seed see the same batches in the same order. A finished directory with the same
    ``identity`` is loaded instead of trained again.

    Raises
    ------
    StageFailed, Interrupted, MoesaicError : as ``Workers.train``.
    """
    training = single_training(architecture, config, corpus, device, seed)
    model = training[0]
    if inherited is not None:
        model.load_state_dict(inherited.state_dict())
    weights = directory / "model.safetensors"
    tensors, metadata = load_tensors(weights) if weights.exists() else ({}, {})
    if metadata.get("identity") == identity:
        load_weights(model, tensors, str(weights))
    else:
        job = single_job(architecture, config, seed)
        workers.train(training, job, corpus, device, directory, identity, on_step, should_stop)
        save_tensors(weights, dict(model.named_parameters()), {"identity": identity})
        (directory / CHECKPOINT).unlink(missing_ok=True)
    model.eval()
    with autocast(device):
        evaluation = evaluate(model, corpus.windows("test", config.evaluation_windows))
    return Retrained(model, evaluation)


def loss_figures(corpus: Corpus, evaluation: Evaluation) -> dict[str, Any]:
    """Loss on the test split in every unit that people compare."""
    return {
        "loss": evaluation.loss,
        "standard_error": evaluation.standard_error,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": corpus.bits_per_byte("test", evaluation.loss),
        "tokens": evaluation.tokens,
    }


def seed_directory(directory: Path, seed: int) -> Path:
    """Where a model that is trained with several seeds is trained with ``seed``."""
    return directory / f"seed-{seed}"


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of one model's ``loss_figures``, and ``runs`` themselves.

    ``interval`` is where the mean loss over all seeds is with a confidence of 95 % (Student), None for one seed;
    ``standard_error`` stays that over sequences.
    """
    means = {
        key: float(np.mean([run[key] for run in runs]))
        for key in ("loss", "standard_error", "perplexity", "bits_per_byte")
    }
    losses = np.array([run["loss"] for run in runs])
    interval = list(mean_interval(losses)) if len(runs) > 1 else None
    return {**means, "tokens": runs[0]["tokens"], "interval": interval, "runs": list(runs)}


def half_interval(result: dict[str, Any]) -> float | None:
    """Half the width of the 95 % interval of the mean loss that ``over_seeds`` gives; None for one seed."""
    return (result["interval"][1] - result["interval"][0]) / 2 if result["interval"] else None


def paired_difference(evaluation: Evaluation, reference: Evaluation) -> dict[str, float]:
    """Mean of the differences in loss, sequence by sequence, its standard error and 95 % interval.

    What two models share (easy and hard text) cancels, so the error is far smaller than that of either loss. Chance in
    training is not in it.
    """
    return _mean_of(np.array(evaluation.sequence_losses) - np.array(reference.sequence_losses))


def difference_over_seeds(evaluations: Sequence[Evaluation], references: Sequence[Evaluation]) -> dict[str, float]:
    """The same for two models trained with the same seeds, seed by seed, with chance in training in it; of one seed
    it is that over sequences. ``seeds`` says how many there are."""
    pairs = list(zip(evaluations, references, strict=True))
    if len(pairs) == 1:
        return {**paired_difference(*pairs[0]), "seeds": 1}
    return {**_mean_of(np.array([mine.loss - other.loss for mine, other in pairs])), "seeds": len(pairs)}


def _mean_of(differences: np.ndarray) -> dict[str, float]:
    low, high = mean_interval(differences)
    error = float(differences.std(ddof=1) / len(differences) ** 0.5)
    return {"mean": float(differences.mean()), "standard_error": error, "low": low, "high": high}
