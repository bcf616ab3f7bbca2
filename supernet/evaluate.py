"""Loss of an architecture on held-out text, how sure that loss is, and where its tokens went."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.search_spaces import Architecture
from moesaic.supernet.model import Transformer


@dataclass(frozen=True)
class LayerLoad:
    """Measured routing of one layer: pairs per token of each expert, so their sum is the mean experts per token."""

    pairs_per_token: tuple[float, ...]

    @property
    def experts_per_token(self) -> float:
        return sum(self.pairs_per_token)


@dataclass(frozen=True)
class Evaluation:
    """``loss`` in nats per token, its ``standard_error`` over sequences, and the load of each layer (None: dense).

    ``sequence_losses`` are the means of the single sequences: models judged on the same ones compare in pairs.
    """

    loss: float
    standard_error: float
    tokens: int
    loads: tuple[LayerLoad | None, ...]
    sequence_losses: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.inference_mode()
def evaluate(
    model: Transformer,
    windows: Tensor,
    architecture: Architecture | None = None,
    batch_size: int = 32,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Mean cross-entropy over ``windows`` [n, S + 1]: S tokens predicted in each, from the ones before them."""
    architecture = model.architecture if architecture is None else architecture
    device = model.embedding.weight.device
    losses = []
    pairs: list[Tensor | None] = [None] * len(architecture.decoder.layers)
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size].to(device)
        output = model.run(batch[:, :-1], architecture)
        loss = F.cross_entropy(output.logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(len(batch), -1).mean(1).double().cpu())
        for index, routing in enumerate(output.routings):
            if routing is not None:
                load = routing.load.double().cpu()
                seen = pairs[index]
                pairs[index] = load if seen is None else seen + load
        on_batch()
    per_sequence = torch.cat(losses)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    error = per_sequence.std().item() / len(per_sequence) ** 0.5 if len(per_sequence) > 1 else math.inf
    loads = tuple(None if load is None else LayerLoad(tuple((load / tokens).tolist())) for load in pairs)
    return Evaluation(per_sequence.mean().item(), error, tokens, loads, tuple(per_sequence.tolist()))
