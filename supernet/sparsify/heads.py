"""The order of a layer's attention heads: what is pruned first comes last.

Shapes: B sequences, S positions, T = B S tokens, D width, H heads, K key/value heads, C head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.supernet.attention import SelfAttention


def head_order(layer: SelfAttention, mixed: Tensor) -> Tensor:
    """[K] groups of heads that share a key/value head, by the mean square of what they add to the output.

    ``mixed`` [T, H C] is what the output weights read.
    """
    groups = layer.attention.kv_heads
    per_group = zip(mixed.chunk(groups, dim=1), layer.o.chunk(groups, dim=1), strict=True)
    added = torch.stack([(values @ rows.T).square().sum(1).mean() for values, rows in per_group])
    return added.argsort(descending=True, stable=True)


def reorder_heads(layer: SelfAttention, groups: Tensor) -> None:
    """Change the order of ``layer``'s groups of heads; its output stays the same."""
    for name, value in list(layer.named_parameters()):
        dim = 1 if name == "o" else 0
        # The output's bias has no heads, nor has a norm that is the same for each head.
        if name != "o_bias" and not (name.endswith("_norm") and layer.backbone.qk_norm == "head"):
            apart = value.detach().unflatten(dim, (layer.attention.kv_heads, -1))
            changed = apart.index_select(dim, groups).flatten(dim, dim + 1)
            setattr(layer, name, nn.Parameter(changed, requires_grad=False))
