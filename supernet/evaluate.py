"""Loss of an architecture on held-out sequences, with its standard error and the load of the experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.search_spaces import Architecture
from moesaic.supernet.batch import Batch
from moesaic.supernet.losses import LOSSES
from moesaic.supernet.model import Output, Transformer


@dataclass(frozen=True)
class LayerLoad:
    """Measured routing of one layer: pairs per token of each expert, so their sum is the mean experts per token."""

    pairs_per_token: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """``loss``, a mean over the ``tokens`` that are scored, its ``standard_error`` over sequences, and the load of each
    of ``architecture.layers`` (None: dense).

    ``sequence_losses`` are the means of the single sequences, for paired comparisons of models on the same sequences.
    """

    loss: float
    standard_error: float
    tokens: int
    loads: tuple[LayerLoad | None, ...]
    sequence_losses: tuple[float, ...] = ()


_LOGITS = 2**25
"""Values of the logits held at once: 128 MiB of float32, and as much again in the loss. A vocabulary of 131,072 and 32
sequences of 4,096 tokens would take 69 GB."""


@torch.inference_mode()
def evaluate(
    model: Transformer,
    batch: Batch,
    architecture: Architecture | None = None,
    loss: str = "cross_entropy",
    rows: int = 32,
    on_rows: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Mean of ``loss`` (a key of ``LOSSES``) over the tokens of ``batch``, computed ``rows`` sequences at a time, and
    the logits of as many positions at a time as memory is set aside for."""
    architecture = model.architecture if architecture is None else architecture
    losses, counts = [], batch.scored_counts().double().cpu()
    pairs: list[Tensor | None] = [None] * len(architecture.layers)
    for first in range(0, len(batch), rows):
        part = batch[first : first + rows].trimmed().to(model.device)
        states, routings = model.states(part.tokens, architecture, **part.beside)
        length = max(1, _LOGITS // (len(part) * model.vocab_size))
        pieces = zip(states.split(length, dim=1), part.split(length), strict=True)
        nats = torch.cat([LOSSES[loss](Output(model.logits(x), routings), piece) for x, piece in pieces], dim=1)
        losses.append(part.means(nats).double().cpu())
        for index, routing in enumerate(routings):
            if routing is not None:
                load = routing.load.double().cpu()
                seen = pairs[index]
                pairs[index] = load if seen is None else seen + load
        on_rows()
    per_sequence = torch.cat(losses)
    mean, error = _mean_and_error(per_sequence, counts)
    read, written = int(batch.source_counts().sum()), int(batch.counts().sum())
    loads = tuple(
        None if load is None else LayerLoad(tuple((load / (read if slot.stack == "encoder" else written)).tolist()))
        for slot, load in zip(architecture.layers, pairs, strict=True)
    )
    return Evaluation(mean, error, int(counts.sum()), loads, tuple(per_sequence.tolist()))


def _mean_and_error(losses: Tensor, counts: Tensor) -> tuple[float, float]:
    """Mean over the tokens of sequences with mean ``losses`` [n] and ``counts`` [n] tokens, and its standard error:
    that of a mean if all have one length, else that of a ratio (Cochran 1977, 2.11); infinite for one sequence.
    Sequences without tokens are ignored."""
    losses, counts = losses[counts > 0], counts[counts > 0]
    size = len(losses)
    if bool((counts == counts[:1]).all()):
        return losses.mean().item(), losses.std().item() / size**0.5 if size > 1 else math.inf
    mean = (losses * counts).sum() / counts.sum()
    deviations = counts / counts.mean() * (losses - mean)
    return mean.item(), ((deviations**2).sum() / (size - 1) / size).sqrt().item()
