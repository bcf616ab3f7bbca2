from random import Random

import pytest
import torch

from moesaic.nas.context import Context
from moesaic.nas.costs.price import Pricer
from moesaic.nas.search.budget import Budget
from moesaic.nas.search.thresholds import lower_thresholds, lower_thresholds_to_fit
from moesaic.nas.tasks.language import next_tokens
from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, Router, Stack
from moesaic.supernet import Judge, Transformer, evaluate
from tests.nas.search_tools import budget_of, tiny_space

BATCH = next_tokens(torch.randint(0, 64, (8, 17), generator=torch.Generator().manual_seed(0)))
PRICER = Pricer(Context(64, 16, 2))


def threshold_model() -> Transformer:
    torch.manual_seed(0)
    part = FeedForward((64, 64, 32, 32), Router("threshold", threshold=0.9, max_k=4))
    layer = Layer(Attention(2, 1), part)
    model = Transformer(Architecture(Stack(32, (layer, layer)), Backbone(head_size=16)), 64).eval()
    for module in model.layers:
        torch.nn.init.normal_(module.feed_forward.router, std=0.5)
    return model


def measured(model: Transformer, architecture: Architecture) -> float:
    return PRICER.measured(architecture, evaluate(model, BATCH, architecture).loads)["flops"]


@pytest.mark.parametrize("share", [0.95, 0.85, 0.7])
def test_a_model_over_budget_is_brought_just_inside(share):
    model = threshold_model()
    limit = share * measured(model, model.architecture)
    budget = budget_of(tiny_space(), flops=f"{limit} FLOPs")
    held = lower_thresholds_to_fit(Judge(model, BATCH), budget)
    assert held != model.architecture
    assert measured(model, held) <= limit
    assert measured(model, held) > 0.9 * limit
    assert [part.expert_sizes for part in parts(held)] == [part.expert_sizes for part in parts(model.architecture)]


def test_what_is_inside_or_cannot_be_helped_is_left_alone():
    model = threshold_model()
    flops = measured(model, model.architecture)
    roomy = budget_of(tiny_space(), flops=f"{1.1 * flops} FLOPs")
    assert lower_thresholds_to_fit(Judge(model, BATCH), roomy) == model.architecture
    impossible = Budget(budget_of(tiny_space(), flops="1 FLOPs").lines, PRICER)
    assert lower_thresholds_to_fit(Judge(model, BATCH), impossible) == model.architecture


def test_compute_falls_with_the_thresholds_to_one_expert():
    model = threshold_model()
    found = [measured(model, lower_thresholds(model.architecture, f)) for f in (0.0, 0.3, 0.6, 0.8, 1.0)]
    assert found == sorted(found)
    assert found[0] < found[-1]
    assert all(part.router == Router("top_k", k=1) for part in parts(lower_thresholds(model.architecture, 0.0)))


def test_routers_without_a_threshold_stay():
    space, rng = tiny_space(), Random(0)
    fixed = next(
        a
        for a in (space.sample_balanced(rng) for _ in range(500))
        if all(p.router is None or p.router.kind == "top_k" for p in parts(a))
    )
    assert lower_thresholds(fixed, 0.5) == fixed


def parts(architecture: Architecture) -> list[FeedForward]:
    return [layer.feed_forward for layer in architecture.layers.values()]
