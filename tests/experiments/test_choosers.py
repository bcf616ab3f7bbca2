"""Routers for analysis choose what they say, and merged experts are averages of aligned ones."""

from __future__ import annotations

import torch

from experiments.choosers import choose_by, refit, true_masses
from experiments.uncurl.merging import merged
from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, Router
from moesaic.search_spaces.architecture import Stack
from moesaic.search_spaces.trained import TrainedSpec
from moesaic.supernet import Transformer
from moesaic.supernet.sparsify.split import split

ATTENTION = Attention(2, 2)


def model_of(part: FeedForward, activation: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(Architecture(Stack(32, (Layer(ATTENTION, part),) * 2), Backbone(16, activation)), 61).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def windows() -> torch.Tensor:
    return torch.randint(0, 61, (8, 16), generator=torch.Generator().manual_seed(1))


def test_the_oracle_takes_the_experts_of_the_largest_mass_and_chance_takes_any() -> None:
    source = model_of(FeedForward((128,)), "relu")
    space = TrainedSpec().build(source.architecture)
    model = split(source, space, windows()).model
    part = FeedForward((16,) * 6, Router("top_k", k=2, weights="one", score="mass"), 32)
    layer, x = model.layers[0].feed_forward, torch.randn(20, 32)
    choose_by(model, "oracle")
    chosen = layer.route(x, part).probabilities.topk(2, 1).indices
    assert torch.equal(chosen, true_masses(layer, x, part).topk(2, 1).indices)
    choose_by(model, "random")
    assert len(layer.route(x, part).load.nonzero()) > 2
    choose_by(model, None)
    own = layer.route(x, part).probabilities
    before = layer.router.clone()
    refit(model, windows(), "similarity")
    assert not torch.equal(layer.route(x, part).probabilities, own)
    refit(model, windows(), "regression")
    torch.testing.assert_close(layer.router, before, atol=1e-4, rtol=1e-3)


def test_merging_into_all_groups_changes_nothing_and_equal_experts_merge_exactly() -> None:
    """Expert 1 is expert 0 with its neurons in another order, and has the same router row."""
    model = model_of(FeedForward((32,) * 4, Router("top_k", k=2), 16), "swiglu")
    tokens = windows()
    assert torch.equal(merged(model, tokens, 4)(tokens), model(tokens))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    for layer in model.layers:
        part = layer.feed_forward
        for weight in (part.up, part.gate, part.down):
            weight.data[48:80] = weight.data[16:48][order]
        part.router.data[0] *= 0.01  # used where the others' logits are negative: less than these, so that 1 is no core
        part.router.data[1] = part.router.data[0]
    found = merged(model, tokens, 3)
    torch.testing.assert_close(found(tokens), model(tokens), atol=1e-5, rtol=1e-5)
    for layer in found.layers:
        assert torch.equal(layer.feed_forward.up[16:48], layer.feed_forward.up[48:80])
    one = merged(model, tokens, 1)
    for layer in one.layers:
        experts = layer.feed_forward.up[16:].unflatten(0, (-1, 32))
        assert (experts == experts[0]).all()
