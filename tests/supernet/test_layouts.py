"""The memory layout of an operator's result differs between kernels and devices: no computation may rely on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.search_spaces import Backbone
from moesaic.supernet import KeyValueCache, Transformer, evaluate, experts
from tests.supernet.network_tools import DENSE, SPARSE, VOCABULARY, network, padded_batch, randomised, tokens_of

OPERATORS = [
    (F, "scaled_dot_product_attention"),
    (F, "linear"),
    (F, "rms_norm"),
    (F, "embedding"),
    (F, "cross_entropy"),
    (experts, "sparse_ffn"),
]


def heads_last(tensor: Tensor) -> Tensor:
    """The same values, dimensions 1 and 2 exchanged in memory: [B, S, H, C] for [B, H, S, C], as the memory-efficient
    attention kernel of a GPU returns them."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() > 2 else backwards(tensor)


def backwards(tensor: Tensor) -> Tensor:
    """The same values, the first dimension contiguous in memory."""
    reverse = tuple(reversed(range(tensor.dim())))
    return tensor.permute(reverse).contiguous().permute(reverse)


def results(model: Transformer) -> list[Tensor]:
    """Logits of a prefill, of decoding steps, and the loss of padded sequences."""
    tokens, batch = tokens_of(3, 6), padded_batch([(0, 6), (2, 5)], 6)
    cache = KeyValueCache(model.architecture, 3, 6)
    steps = [model.run(piece, cache=cache).logits for piece in tokens.split([4, 1, 1], dim=1)]
    return [model(tokens), *steps, torch.tensor(evaluate(model, batch).loss)]


@pytest.mark.parametrize("layout", [heads_last, backwards])
@pytest.mark.parametrize(("module", "name"), OPERATORS, ids=[name for _, name in OPERATORS])
@torch.no_grad()
def test_results_do_not_depend_on_the_layout_of_an_operators_output(module, name, layout, monkeypatch):
    grouped = replace(DENSE, attention=SPARSE.attention)  # two query heads share one of keys and values
    model = randomised(Transformer(network(Backbone(12), SPARSE, grouped), VOCABULARY))
    expected = results(model)
    operator, called = getattr(module, name), []

    def other_layout(*args, **options):
        called.append(name)
        return layout(operator(*args, **options))

    monkeypatch.setattr(module, name, other_layout)
    for found, known in zip(results(model), expected, strict=True):
        torch.testing.assert_close(found, known)
    assert called
