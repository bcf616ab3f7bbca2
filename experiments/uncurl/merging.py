"""Merging the experts of a mixture in groups, to compare with keeping the best: MC-SMoE's way (arXiv 2310.01334).

A merged set is no slice of the trained bank, and the whole mixture no member of a merged one, so the tool does not
search it; this measures what that leaves out. Shapes: T tokens, E experts, n neurons of an expert, D width.
"""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moesaic import Transformer
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.sparsify.split import LayerInput, layer_inputs

_BANK = ("up", "gate", "down")


@torch.no_grad()
def merged(model: Transformer, windows: Tensor, groups: int) -> Transformer:
    """A copy of a mixture in which each layer has ``groups`` different experts; its router chooses among as many as
    before, and a token with two experts of a group uses their common one twice.

    The most used experts are the cores; another joins the core whose router logits are most like its own on
    ``windows`` [B, S] of token ids. A group is the average of its experts by use, neurons aligned to the core's.
    """
    found = deepcopy(model)
    for given, layer in zip(layer_inputs(model, windows), found.layers, strict=True):
        _merge(given, layer.feed_forward, groups)
    return found


def _merge(given: LayerInput, new: SparseFeedForward, groups: int) -> None:
    old, part, read = given.block.feed_forward, given.layer.feed_forward, given.read()
    assert old.router is not None
    logits = F.normalize(F.linear(read, old.router), dim=0)  # [T, E]
    use = old.route(read, part).load
    cores = use.argsort(descending=True)[:groups]
    joined = cores[(logits.T @ logits)[:, cores].argmax(1)]
    joined[cores] = cores
    size, shared = part.expert_sizes[0], part.shared_size
    experts = torch.cat([getattr(old, name)[shared:] for name in _BANK if getattr(old, name) is not None], 1)
    experts = experts.unflatten(0, (-1, size))  # [E, n, 2 or 3 D]
    for core in cores.tolist():
        members = (joined == core).nonzero()[:, 0]
        aligned = torch.stack([_aligned(experts[member], experts[core]) for member in members.tolist()])
        weights = use[members].clamp(min=1).float()
        average = torch.einsum("e,end->nd", weights / weights.sum(), aligned).split(old.width, 1)
        names = [name for name in _BANK if getattr(old, name) is not None]
        for member in members.tolist():
            rows = slice(shared + member * size, shared + (member + 1) * size)
            for name, values in zip(names, average, strict=True):
                getattr(new, name)[rows] = values


def _aligned(expert: Tensor, core: Tensor) -> Tensor:
    """The neurons of ``expert`` [n, d] in the order in which they are most like those of ``core``."""
    likeness = F.normalize(core, dim=1) @ F.normalize(expert, dim=1).T
    return expert[linear_sum_assignment(likeness.double().numpy(), maximize=True)[1]]
