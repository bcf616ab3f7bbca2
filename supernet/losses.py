"""Training losses: functions from a model's output and its batch to a loss at every position."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from moesaic.supernet.batch import Batch
from moesaic.supernet.model import Output

Loss = Callable[[Output, Batch], Tensor]
"""[B, S], in nats or as the loss says; values at padding are not used."""


def cross_entropy(output: Output, batch: Batch) -> Tensor:
    """-log p(target) in float32."""
    logits = output.logits.float().flatten(0, 1)  # [B * S, V]
    return F.cross_entropy(logits, batch.targets.flatten(), reduction="none").view_as(batch.targets)


def uniform_cross_entropy(output: Output) -> Tensor:
    """[B, S] mean of -log p over the vocabulary in float32, which label smoothing mixes in (arXiv 1512.00567)."""
    logits = output.logits.float()
    return logits.logsumexp(-1) - logits.mean(-1)


def distillation(output: Output, batch: Batch) -> Tensor:
    """KL(teacher || model) in float32, from log-probabilities: finite whatever the logits (arXiv 1503.02531)."""
    assert batch.teacher is not None
    found, wanted = (logits.float().log_softmax(-1) for logits in (output.logits, batch.teacher))
    return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)


def cosine_distance(output: Output, batch: Batch) -> Tensor:
    """1 - cosine between the states of a model without a head and those of ``teacher``, in float32: 0 to 2."""
    assert batch.teacher is not None
    return 1 - F.cosine_similarity(output.logits.float(), batch.teacher.float(), dim=-1)


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "distillation": distillation,
    "cosine_distance": cosine_distance,
}
"""By name, so that another process can find them."""
