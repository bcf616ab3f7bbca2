"""Losses of a model in which one layer is replaced, each from the states before that layer: half a pass on average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moesaic.search_spaces import Architecture, Layer, Slot
from moesaic.supernet.batch import Batch, Inputs
from moesaic.supernet.losses import LOSSES
from moesaic.supernet.model import Output, Transformer
from moesaic.supernet.stack import TransformerLayer, TransformerStack


@torch.inference_mode()
def replacement_losses(
    model: Transformer,
    architecture: Architecture,
    replacements: Mapping[Slot, Sequence[Layer]],
    batch: Batch,
    loss: str = "cross_entropy",
    on_layer: Callable[[int], None] = lambda done: None,
) -> tuple[float, dict[Slot, list[float]]]:
    """The loss of the slice ``architecture``, and its losses with the layer of each slot replaced alone, by each of its
    ``replacements``, on the unpadded ``batch``; ``loss`` is a key of ``LOSSES``. ``on_layer`` gets the number of layers
    that are done."""
    batch = batch.to(model.device)
    ((name, stack),) = architecture.stacks.items()
    module, inputs = model.stacks[name], Inputs(stack.causal)
    assert isinstance(module, TransformerStack)
    blocks = [block for block in module.layers if isinstance(block, TransformerLayer)]

    def end(x: Tensor) -> float:
        logits = model.logits(x if module.norm is None else module.norm(x))
        return batch.mean(LOSSES[loss](Output(logits, ()), batch)).item()

    x, losses = module.embedded(batch.tokens, stack), dict[Slot, list[float]]()
    for index, (block, layer) in enumerate(zip(blocks, stack.layers, strict=False)):
        slot = Slot(name, index)
        for replacement in replacements.get(slot, ()):
            changed = block(x, replacement, inputs)[0]
            for later, own in zip(blocks[index + 1 :], stack.layers[index + 1 :], strict=False):
                changed = later(changed, own, inputs)[0]
            losses.setdefault(slot, []).append(end(changed))
        x = block(x, layer, inputs)[0]
        on_layer(index + 1)
    return end(x), losses
