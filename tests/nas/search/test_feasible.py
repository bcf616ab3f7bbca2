"""Draws inside budgets have the law of the space given the budget: against enumeration, for one and two stacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb
from random import Random

import numpy as np
import pytest
from scipy.stats import chisquare

from moesaic.nas.context import Context
from moesaic.nas.costs.additive import Term
from moesaic.nas.costs.price import Pricer
from moesaic.nas.costs.use import Occupancy
from moesaic.nas.search.budget import Budget, BudgetLine, find_feasible
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.search_spaces import Architecture, Router, SearchSpace, Slot, load_space, preset_source
from moesaic.search_spaces.yaml_source import YamlSource
from tests.nas.search_tools import PRICER
from tests.search_spaces.pruned import pruned_space
from tests.search_spaces.two_stacks import two_stack_space

LAYER = {
    "heads": [1],
    "kv_heads": [1],
    "experts": [1, 3],
    "dense_sizes": [16, 32, 48, 96],
    "expert_sizes": [16, 48],
    "routers": [{"kind": "top_k", "k": [1, 2]}],
}
OTHER = {"heads": [1, 2], "shared_sizes": [0, 16], "routers": [{"kind": "top_k", "k": [2]}]}
ONE = load_space(YamlSource("one", {"width": [16, 32], "depth": [2, 3], "layer": LAYER, "layers": {1: OTHER}}))
STD = load_space(YamlSource("std", {"width": [16, 32], "depth": [2, 3], "layer": LAYER | {"equal_sizes": True}}))
TWO = two_stack_space()
PRUNED = pruned_space()
SPACES = {"one": ONE, "std": STD, "two": TWO, "pruned": PRUNED}
MEMBERS = {name: list(space) for name, space in SPACES.items()}


UNEVEN = Occupancy({(Slot("decoder", 0), 3, Router("top_k", k=2)): (1.0, 0.75, 0.25)})
PRICERS = {
    "one": PRICER,
    "uneven": Pricer(PRICER.context, UNEVEN),
    "layers' peaks": Pricer(Context(16, 64, 8)),
    "two": Pricer(Context(64, 16, 2, source_length=8)),
    "pruned": PRICER,
    "std": PRICER,
}
BUDGETS = [
    ("one", 0.01, [("flops", "expected")]),
    ("one", 0.03, [("parameters", "expected")]),
    ("one", 0.04, [("parameters", "expected"), ("active_parameters", "worst")]),
    ("one", 0.02, [("memory", "expected")]),
    ("uneven", 0.04, [("flops", "expected"), ("parameters", "expected"), ("memory", "worst")]),
    ("layers' peaks", 0.02, [("memory", "expected")]),
    ("two", 0.02, [("flops", "expected")]),
    ("pruned", 0.03, [("flops", "expected")]),
    ("pruned", 0.05, [("flops", "worst"), ("parameters", "expected")]),
    ("two", 0.05, [("flops", "worst"), ("parameters", "expected")]),
    ("std", 0.03, [("flops", "expected"), ("parameters", "expected")]),
]


def probability(space: SearchSpace, architecture: Architecture) -> float:
    """Of a member under ``sample_balanced``: every choice in turn is uniform."""
    found = 1.0
    for name, stack in architecture.stacks.items():
        choices = space.stacks[name]
        found /= len(choices.widths) * len(choices.depths)
        for layer, options in zip(stack.layers, choices.layers, strict=False):
            group = options.group(layer.feed_forward.experts)
            assert group is not None
            chosen = 1 if group.equal else group.experts
            multisets = comb(len(group.sizes) + chosen - 1, chosen)
            parts = multisets * len(group.routers) * len(group.shared_sizes)
            found /= len(options.attentions) * len(options.crosses) * len(options.groups) * parts
    return found


def tight(name: str, share: float, terms: Sequence[Term]) -> tuple[FeasibleSampler, dict[Architecture, float]]:
    """A budget of the lines ``terms``, each of which members of probability ``share`` meet, and the probabilities of
    the members that meet all."""
    own = name if name in SPACES else "one"
    space, members, pricer = SPACES[own], MEMBERS[own], PRICERS[name]
    chances = np.array([probability(space, a) for a in members])
    lines = []
    for cost, bind in terms:
        costs = np.array([getattr(pricer, bind)(a)[cost] for a in members])
        order = costs.argsort()
        at = int(np.searchsorted(chances[order].cumsum(), share))
        lines.append(BudgetLine(cost, float(costs[order[at]]), bind))
    budget = Budget(tuple(lines), pricer)
    inside = {a: float(chance) for a, chance in zip(members, chances, strict=True) if budget.fits(a)}
    return FeasibleSampler(space, budget, next(iter(inside))), inside


@pytest.mark.parametrize("name", MEMBERS)
def test_the_probabilities_of_all_members_add_up_to_one(name):
    space = SPACES[name]
    assert sum(probability(space, a) for a in MEMBERS[name]) == pytest.approx(1)


@pytest.mark.parametrize(("name", "share", "terms"), BUDGETS)
def test_draws_in_a_tight_budget_have_the_law_of_the_space_given_the_budget(name, share, terms):
    feasible, inside = tight(name, share, terms)
    total = sum(inside.values())
    assert 0 < total < 0.06, "so few that rejection would not do"
    draws, rng = 400, Random(0)
    drawn = Counter(feasible.sample(rng) for _ in range(draws))
    assert set(drawn) <= set(inside)
    ordered = sorted(inside, key=lambda a: (inside[a], a.fingerprint))
    expected = np.array([inside[a] for a in ordered]) * draws / total
    bins = (expected.cumsum() - expected).astype(int) // 10  # members together, with some 10 draws a bin
    observed, wanted = np.bincount(bins, [drawn[a] for a in ordered]), np.bincount(bins, expected)
    assert (wanted > 0).sum() >= 6
    assert chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_widths_depths_and_numbers_of_dense_layers_have_that_law_too(share):
    """A walk that does not mix leaves these where it began."""
    feasible, inside = tight("one", share, [("flops", "expected"), ("parameters", "expected")])
    rng, draws = Random(1), 2000

    def kind(a: Architecture) -> tuple[int, int, int]:
        return a.output.width, len(a.layers), sum(layer.feed_forward.router is None for layer in a.layers.values())

    wanted = Counter[tuple[int, int, int]]()
    for architecture, chance in inside.items():
        wanted[kind(architecture)] += chance * draws / sum(inside.values())
    counts = Counter(kind(a) for a in (feasible.sample(rng) for _ in range(draws)) if a is not None)
    assert counts.keys() <= wanted.keys()
    distance = sum(abs(counts[one] - wanted[one]) for one in wanted) / (2 * draws)
    assert distance < 0.05, "total variation"
    assert chisquare([counts[one] for one in wanted], list(wanted.values())).pvalue > 1e-3


def test_a_draw_in_a_millionth_of_a_large_space_prices_few_members(monkeypatch):
    """The share of proposals kept falls slowly with the share of the space that is inside."""
    space, rng = load_space(preset_source("medium")), Random(0)
    least = min(PRICER.expected(space.sample_balanced(rng))["flops"] for _ in range(2000))
    budget = Budget((BudgetLine("flops", 0.8 * least, "expected"),), PRICER)
    feasible = FeasibleSampler(space, budget, find_feasible(space, budget))
    assert feasible.acceptance(500, rng) == 0
    priced, fits = [], Budget.fits
    monkeypatch.setattr(Budget, "fits", lambda self, a, expected=None: priced.append(a) or fits(self, a, expected))
    drawn = [feasible.sample(rng) for _ in range(40)]
    assert len(priced) <= 40 * 20 + 64
    assert len(set(drawn)) == 40
    assert all(a is not None and budget.fits(a) and a in space for a in drawn)


def test_draws_are_functions_of_the_generator():
    feasible, _ = tight("one", 0.01, [("flops", "expected")])
    again = FeasibleSampler(ONE, feasible.budget, feasible.inside)
    assert [feasible.sample(Random(s)) for s in range(20)] == [again.sample(Random(s)) for s in range(20)]


def test_a_budget_that_one_member_meets_gives_that_member():
    least = min(MEMBERS["one"], key=lambda a: PRICER.expected(a)["flops"])
    budget = Budget((BudgetLine("flops", PRICER.expected(least)["flops"], "expected"),), PRICER)
    inside = [a for a in MEMBERS["one"] if budget.fits(a)]
    feasible, rng = FeasibleSampler(ONE, budget, least), Random(0)
    assert {feasible.sample(rng) for _ in range(40 * len(inside))} == set(inside)


def test_a_budget_that_nothing_meets_ends_the_draw():
    budget = Budget((BudgetLine("flops", 1.0, "expected"),), PRICER)
    assert FeasibleSampler(ONE, budget, ONE.smallest).sample(Random(0)) is None


# ---------------------------------------------------------------- repair


def test_repair_ends_inside_and_leaves_what_fits_alone():
    feasible, rng = tight("one", 0.05, [("flops", "expected")])[0], Random(0)
    for _ in range(50):
        architecture = ONE.sample_balanced(rng)
        repaired = feasible.repair(architecture, rng)
        assert feasible.budget.fits(repaired)
        assert repaired in ONE
        assert repaired == architecture or not feasible.budget.fits(architecture)


def test_repair_prices_few_members_and_keeps_most_layers_of_one_just_outside(monkeypatch):
    space, rng = load_space(preset_source("medium")), Random(0)
    drawn = [space.sample(rng) for _ in range(200)]  # nearly all of the largest depth
    costs = [PRICER.expected(a)["flops"] for a in drawn]
    budget = Budget((BudgetLine("flops", float(np.median(costs)), "expected"),), PRICER)
    feasible = FeasibleSampler(space, budget, find_feasible(space, budget))
    outside = [a for a, cost in zip(drawn, costs, strict=True) if 1 < cost / budget.lines[0].limit < 1.1][:20]
    feasible.sample(rng)
    priced, fits = [], Budget.fits
    monkeypatch.setattr(Budget, "fits", lambda self, a, expected=None: priced.append(a) or fits(self, a, expected))
    kept = []
    for architecture in outside:
        repaired = feasible.repair(architecture, rng)
        assert fits(budget, repaired)
        same = sum(repaired.layers.get(slot) == layer for slot, layer in architecture.layers.items())
        kept.append(same / len(architecture.layers))
    assert len(outside) == 20
    assert np.median(kept) > 0.5
    assert len(priced) / len(outside) < 12


def test_repair_mixes_two_stacks():
    feasible, rng = tight("two", 0.1, [("flops", "expected")])[0], Random(0)
    for _ in range(50):
        repaired = feasible.repair(TWO.sample(rng), rng)
        assert repaired in TWO
        assert feasible.budget.fits(repaired)
