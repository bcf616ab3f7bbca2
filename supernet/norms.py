"""Normalisation layers that accept any number of features up to their size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.search_spaces import Backbone
from moesaic.supernet.regions import Region


class Norm(nn.Module):
    """RMSNorm (arXiv 1910.07467), or LayerNorm with a bias (arXiv 1607.06450), as the backbone says."""

    def __init__(self, width: int, backbone: Backbone):
        super().__init__()
        self.eps = backbone.norm_eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if backbone.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        weight = self.weight[:width]
        if self.bias is None:
            return F.rms_norm(x, (width,), weight, self.eps)
        return F.layer_norm(x, (width,), weight, self.bias[:width], self.eps)

    def where(self, width: int) -> dict[str, Region]:
        """The region of each parameter that ``width`` features use. Raises ValueError if there are fewer."""
        if width > len(self.weight):
            raise ValueError(f"width {width} exceeds {len(self.weight)}")
        names = ("weight",) if self.bias is None else ("weight", "bias")
        return dict.fromkeys(names, Region.first(width))
