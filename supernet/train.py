"""Training of supernets and of single models: slices per step, checkpoints, exact resume.

Everything random is a pure function of the seed and the step number, so a checkpoint needs only weights, optimiser
state and the step. A run that was stopped and resumed has the same loss curve, bit for bit on a CPU. Any number of
processes can continue it.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moesaic.search_spaces import Architecture, Interrupted, MoesaicError, StageFailed
from moesaic.search_spaces.files import PathLike
from moesaic.supernet.batch import Batch
from moesaic.supernet.checkpoint import load_tensors, load_weights, save_tensors
from moesaic.supernet.distributed import ALONE, Ranks
from moesaic.supernet.dropout import Dropout
from moesaic.supernet.losses import LOSSES, uniform_cross_entropy
from moesaic.supernet.metrics import MetricLog
from moesaic.supernet.model import Transformer

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class TrainSettings:
    """Optimisation: AdamW, linear warm-up, cosine decay to a tenth, gradient clipping (None clips nothing).

    ``balance_weight`` scales the load-balance loss, a mean over sparse layers; ``bfloat16`` computes products in
    bfloat16. ``label_smoothing`` is the share of a cross-entropy to all tokens alike in the loss that is minimised (but
    not in the reported one), ``dropout`` the probability with which a value is dropped.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    balance_weight: float = 0.01
    label_smoothing: float = 0.0
    dropout: float = 0.0
    bfloat16: bool = False
    checkpoint_every: int = 200
    log_every: int = 10

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class TrainData:
    """``batch(step)`` is the data of a step, ``slices(step)`` the architectures that train on it; ``loss`` is a key of
    ``LOSSES``. ``teacher`` gives the logits [B, S, V] that a loss imitates, for the rows that a process trains on.
    ``seed``, the step and the process decide what is dropped."""

    batch: Callable[[int], Batch]
    slices: Callable[[int], Sequence[Architecture]]
    loss: str = "cross_entropy"
    teacher: Callable[[Batch], Tensor] | None = None
    seed: int = 0


def train(
    model: Transformer,
    data: TrainData,
    settings: TrainSettings,
    directory: PathLike,
    identity: str,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, record: None,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> None:
    """Train ``model`` in place to ``settings.steps``, from the checkpoint in ``directory`` if there is one.

    Parameters
    ----------
    directory : receives ``checkpoint.safetensors``, ``metrics.jsonl`` and ``tensorboard/``.
    identity : fingerprint of everything that affects the result; a checkpoint with another one is refused.
    on_step : called after each step with its metrics (``loss`` in nats per token, the mean over slices, and others).
    should_stop : called before each step; True saves a checkpoint and raises Interrupted.
    ranks : the processes that train together, each of which calls this with the same arguments. The first one writes
        and reports; all stop, and fail, at the same step. Load-balance losses are those of each process's rows.

    Raises
    ------
    StageFailed : the loss or the gradient is not finite; the checkpoint is the last good one.
    Interrupted : after ``should_stop``.
    MoesaicError : the checkpoint is damaged or foreign, or the directory cannot be written.
    """
    directory = Path(directory)
    checkpoint = directory / CHECKPOINT
    optimizer, step = _resume(model, settings, checkpoint, identity, ranks)
    log = MetricLog(directory, step) if ranks.leads else None
    started, first_step = time.perf_counter(), step
    try:
        while step < settings.steps:
            if ranks.any(should_stop()):
                _save(model, optimizer, checkpoint, identity, step, ranks)
                raise Interrupted(f"stopped at step {step} of {settings.steps}; the same command continues from there")
            record = {"step": step, **_train_step(model, optimizer, data, settings, step, checkpoint, ranks)}
            step += 1
            if log is not None:
                if record["step"] % settings.log_every == 0 or step == settings.steps:
                    record["seconds_per_step"] = (time.perf_counter() - started) / (step - first_step)
                    log.write(record)
                on_step(step, record)
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                _save(model, optimizer, checkpoint, identity, step, ranks)
    finally:
        if log is not None:
            log.close()


def save_initial(model: Transformer, directory: Path, identity: str) -> None:
    """Save ``model`` in ``directory`` as a checkpoint of step 0, from which other processes start."""
    weights = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    save_tensors(directory / CHECKPOINT, weights, {"step": "0", "identity": identity})


def load_trained(model: Transformer, path: Path) -> None:
    """Copy the weights of a checkpoint into ``model``. Raises MoesaicError if it is damaged or of another model."""
    load_weights(model, _weights(load_tensors(path)[0]), str(path))


def _train_step(
    model: Transformer,
    optimizer: torch.optim.AdamW,
    data: TrainData,
    settings: TrainSettings,
    step: int,
    checkpoint: Path,
    ranks: Ranks,
) -> dict[str, float]:
    device = model.device
    whole = data.batch(step)
    batch = ranks.rows(whole)
    # Processes are weighted by their tokens, so that the mean over processes is the mean over the batch's tokens.
    share = ranks.size * batch.scored_counts().sum().item() / max(1, whole.scored_counts().sum().item())
    batch = batch.to(device)
    if data.teacher is not None:
        batch = replace(batch, teacher=data.teacher(batch))
    rate = settings.learning_rate_at(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    slices = data.slices(step)
    dropout = Dropout.of(settings.dropout, device, data.seed, step, ranks.rank)
    losses, balances = [], []
    for architecture in slices:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.bfloat16):
            output = model.run(batch.tokens, architecture, **batch.beside, dropout=dropout)
        loss = minimised = batch.mean(LOSSES[data.loss](output, batch)) * share
        if smoothing := settings.label_smoothing:
            minimised = (1 - smoothing) * loss + smoothing * share * batch.mean(uniform_cross_entropy(output))
        balance = output.balance_loss()
        ((minimised + settings.balance_weight * balance) / len(slices)).backward()
        losses.append(loss.item())
        balances.append(balance.item())
    ranks.average_gradients(model, slices)
    figures = ranks.mean([*losses, *balances])
    losses, balances = figures[: len(slices)], figures[len(slices) :]
    longest = math.inf if settings.clip_norm is None else settings.clip_norm
    norm = ranks.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), longest)).item()
    if not all(map(math.isfinite, (*losses, norm))):
        kept = f"the last good one is {checkpoint}" if checkpoint.exists() else "none was written yet"
        raise StageFailed(
            f"training diverged at step {step}: loss {losses}, gradient norm {norm}; no checkpoint was lost, {kept}",
            allowed="a lower learning_rate or a longer warm-up",
            found=f"learning_rate {settings.learning_rate:g}",
        )
    optimizer.step()
    means = (sum(values) / len(slices) for values in (losses, balances))
    return dict(zip(("loss", "balance"), means, strict=True)) | {"learning_rate": rate, "gradient_norm": norm}


def _optimizer(model: Transformer, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (norm weights are scales, not directions)."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    scales = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))


def _save(model: Transformer, optimizer: torch.optim.AdamW, path: Path, identity: str, step: int, ranks: Ranks) -> None:
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = {f"optimizer.{key}.{name}": value for key, value in optimizer.state[parameter].items()}
        for key, value in {f"model.{name}": parameter, **state}.items():
            whole = ranks.whole(value)
            if ranks.leads:
                tensors[key] = whole
    if ranks.leads:
        save_tensors(path, tensors, {"step": str(step), "identity": identity})


def _resume(
    model: Transformer, settings: TrainSettings, path: Path, identity: str, ranks: Ranks
) -> tuple[torch.optim.AdamW, int]:
    """The optimiser and the step to continue from, those of the checkpoint if there is one."""
    tensors, metadata = load_tensors(path) if path.exists() else ({}, {"step": "0", "identity": identity})
    if metadata.get("identity") != identity:
        raise MoesaicError(
            "is a checkpoint of another run",
            where=str(path),
            found=metadata.get("identity"),
            allowed=identity,
            nearest=shlex.join(["mv", str(path.parent), f"{path.parent}.other"]),
        )
    if tensors:
        load_weights(model, _weights(tensors), str(path))
    ranks.shard(model)
    optimizer = _optimizer(model, settings)
    for name, parameter in model.named_parameters():
        if f"optimizer.step.{name}" in tensors:
            optimizer.state[parameter] = {
                "step": tensors[f"optimizer.step.{name}"],
                "exp_avg": ranks.part(tensors[f"optimizer.exp_avg.{name}"], parameter),
                "exp_avg_sq": ranks.part(tensors[f"optimizer.exp_avg_sq.{name}"], parameter),
            }
    return optimizer, int(metadata["step"])


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
