"""Sinusoidal positions."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.supernet.tables import kept


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """[length, D] sin and cos of position / 10000^(2i / D) by turns (arXiv 1706.03762, 3.5)."""
    return _table(table_length(int(length)), width, device)[:length]  # a tracer's lengths are tensors


def table_length(length: int) -> int:
    """Rows of the table that is kept for ``length`` positions: few tables serve all lengths."""
    return 1 << max(6, (length - 1).bit_length())


@kept
def _table(length: int, width: int, device: torch.device) -> Tensor:
    rate = 10_000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(length, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
