"""Costs as sums over layers that are linear in expert sizes, against the pricer, for every member and any draws."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.nas.context import Context, Phase
from moesaic.nas.costs.additive import AdditiveCosts, Term
from moesaic.nas.costs.latency.predictor import TERMS as LATENCY_TERMS
from moesaic.nas.costs.latency.predictor import LatencyPredictor
from moesaic.nas.costs.price import Pricer
from moesaic.nas.costs.use import Occupancy
from moesaic.search_spaces import Architecture, SearchSpace, load_space, preset_source
from moesaic.search_spaces.yaml_source import YamlSource
from tests.search_spaces.pruned import pruned_space
from tests.search_spaces.two_stacks import hat_like_space

CASES = ("expected", "worst")
COSTS = ("flops", "parameters", "active_parameters", "memory")
TERMS: tuple[Term, ...] = tuple((cost, case) for cost in COSTS for case in CASES)
OPT = {"head_size": 16, "activation": "gelu", "biases": "all", "tied": False, "norm": "layer", "positions": "learned"}
BERT = {"activation": "gelu", "norm_place": "post", "head": "masked"}
SPACES = {
    **{name: load_space(preset_source(name)) for name in ("tiny", "small", "xmoe")},
    "pruned": pruned_space(),
    "hat": hat_like_space(),
    "bert": load_space(YamlSource("bert", {"preset": "tiny", "backbone": BERT})),
    "opt": load_space(YamlSource("opt", {"preset": "tiny", "backbone": {**OPT, "max_positions": 64}})),
}


def summed(costs: AdditiveCosts, architecture: Architecture) -> np.ndarray:
    """[terms] the base and every layer's choices."""
    widths = [stack.width for stack in architecture.stacks.values()]
    total = costs.base(widths)
    for slot, layer in architecture.layers.items():
        found, part = costs.layer(slot, widths), layer.feed_forward
        same = (c for c in found.choices if c.group.experts == part.experts and c.router == part.router)
        choice = next(same)
        total = total + found.attentions[costs.space.layers[slot].attentions.index(layer.attention)]
        total = total + found.crosses[costs.space.layers[slot].crosses.index(layer.cross)]
        total = total + choice.constants[choice.group.shared_sizes.index(part.shared_size)]
        total = total + np.array(part.expert_sizes) @ choice.slopes
    return total


def measured(space: SearchSpace) -> Occupancy:
    """Random falling loads at every second slot."""
    rng, found = np.random.default_rng(0), {}
    for slot, layer in list(space.layers.items())[::2]:
        for group in layer.groups:
            for router in filter(None, group.routers):
                loads = np.sort(rng.random(group.experts))[::-1]
                found[slot, group.experts, router] = tuple(loads.tolist())
    return Occupancy(found)


def priced(pricer: Pricer, architecture: Architecture, terms: tuple[Term, ...]) -> list[float]:
    return [getattr(pricer, case)(architecture)[cost] for cost, case in terms]


def context_of(space: SearchSpace, phase: Phase) -> Context:
    reads = {"source_length": 10, "beam": 4 if phase == "translate" else 1} if space.encoder else {}
    return Context(97, 24, 3, phase=phase, **reads)


PASSES = [(name, phase) for name in SPACES for phase in ("prefill", "translate" if SPACES[name].encoder else "decode")]


@pytest.mark.parametrize(("name", "phase"), PASSES)
def test_the_sum_is_the_price_and_for_memory_no_more(name, phase):
    space = SPACES[name]
    pricer = Pricer(context_of(space, phase), measured(space))
    costs, rng = AdditiveCosts(space, pricer, TERMS), Random(0)
    exact = np.array([cost != "memory" for cost, _ in TERMS])
    for architecture in [space.smallest, space.largest, *(space.sample_balanced(rng) for _ in range(40))]:
        total, price = summed(costs, architecture), np.array(priced(pricer, architecture, TERMS))
        assert total == pytest.approx(costs.of(architecture), rel=1e-9)
        assert total[exact] == pytest.approx(price[exact], rel=1e-9)
        assert (total[~exact] <= price[~exact] * (1 + 1e-9)).all()


@pytest.mark.parametrize(("name", "phase"), [("tiny", "prefill"), ("hat", "prefill"), ("hat", "translate")])
def test_predicted_latency_is_such_a_sum(name, phase):
    space, rng = SPACES[name], Random(0)
    context = context_of(space, phase)
    coefficients = tuple(rng.uniform(0.1, 1) for _ in LATENCY_TERMS)
    unused: Any = None
    predictor = LatencyPredictor(coefficients, (0.0,), context, "", "", (), 0, unused, 1.0, unused)
    pricer = Pricer(context, measured(space), predictor)
    terms: tuple[Term, ...] = (("latency", "expected"), ("latency", "worst"))
    costs = AdditiveCosts(space, pricer, terms)
    for _ in range(40):
        architecture = space.sample_balanced(rng)
        assert summed(costs, architecture) == pytest.approx(np.array(priced(pricer, architecture, terms)), rel=1e-9)


@given(seed=st.integers(0, 2**32))
def test_layers_with_equal_choices_and_loads_are_one_value(seed):
    space, rng = SPACES["small"], Random(seed)
    costs = AdditiveCosts(space, Pricer(Context(64, 16)), (("flops", "expected"),))
    slots, widths = list(space.layers), [rng.choice(space.decoder.widths)]
    assert len({id(costs.layer(slot, widths)) for slot in slots}) == 1
    apart = AdditiveCosts(space, Pricer(Context(64, 16), measured(space)), (("flops", "expected"),))
    assert len({id(apart.layer(slot, widths)) for slot in slots}) == 3, "two measured slots, and the others"
