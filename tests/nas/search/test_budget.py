from random import Random

import pytest

from moesaic.nas.search.budget import cheapest, cost_ranges, find_feasible, most_expensive
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.search_spaces import MoesaicError, neighbours
from tests.nas.search_tools import PRICER, budget_of, small_space, tiny_space

COSTS = ["flops", "parameters", "active_parameters", "memory"]


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("bind", ["expected", "worst"])
def test_the_cheapest_is_the_cheapest_of_all(cost, bind):
    space = small_space()
    price = PRICER.worst if bind == "worst" else PRICER.expected
    assert price(cheapest(space, PRICER, cost, bind))[cost] == min(price(a)[cost] for a in space)


@pytest.mark.parametrize("cost", ["flops", "parameters", "active_parameters"])
@pytest.mark.parametrize("bind", ["expected", "worst"])
def test_the_dearest_is_the_dearest_of_all(cost, bind):
    space = small_space()
    price = PRICER.worst if bind == "worst" else PRICER.expected
    assert price(most_expensive(space, PRICER, cost, bind))[cost] == max(price(a)[cost] for a in space)


def test_ranges_hold_every_member():
    space = small_space()
    members = list(space)
    for cost, span in cost_ranges(space, PRICER, members).items():
        values = [PRICER.expected(a)[cost] for a in members]
        assert span.smallest == min(values)
        assert span.largest == max(values)
        assert span.smallest <= span.typical <= span.largest <= span.worst


def test_a_budget_that_can_be_met_has_a_member_inside():
    space = small_space()
    for share in ("35%", "50%", "100%"):
        budget = budget_of(space, flops=share, parameters=share)
        if any(budget.fits(a) for a in space):
            assert budget.fits(find_feasible(space, budget))


def test_a_budget_nothing_meets_says_what_binds_and_what_can_be_reached():
    space = tiny_space()
    with pytest.raises(MoesaicError, match="flops binds") as caught:
        find_feasible(space, budget_of(space, flops="1 kFLOPs", parameters="100%"))
    least = PRICER.expected(cheapest(space, PRICER, "flops"))["flops"]
    nearest = str(caught.value.nearest)
    assert find_feasible(space, budget_of(space, flops=nearest)) in space
    assert f"{least / 1e3:.4g} kFLOPs" in str(caught.value.allowed)


def test_lines_that_exclude_each_other_are_told_apart_from_single_ones():
    space = tiny_space()
    wide = [a for a in (space.sample_balanced(Random(i)) for i in range(200))]
    few_parameters = min(PRICER.expected(a)["parameters"] for a in wide)
    budget = budget_of(space, parameters=str(round(few_parameters)), flops="40%")
    assert budget.fits(find_feasible(space, budget))


def test_worst_case_lines_bind_the_worst_routing():
    space = tiny_space()
    limit = {"limit": "60%", "bind": "worst"}
    budget = budget_of(space, flops=limit)
    rng = Random(0)
    for _ in range(200):
        architecture = space.sample_balanced(rng)
        inside = PRICER.worst(architecture)["flops"] <= budget.lines[0].limit
        assert budget.fits(architecture) == inside


def test_repair_leaves_what_fits_and_mends_the_rest():
    space = tiny_space()
    budget = budget_of(space, flops="50%", parameters="50%")
    sampler = FeasibleSampler(space, budget, find_feasible(space, budget))
    rng = Random(0)
    for _ in range(100):
        architecture = space.sample_balanced(rng)
        repaired = sampler.repair(architecture, rng)
        assert budget.fits(repaired)
        assert repaired in space
        if budget.fits(architecture):
            assert repaired == architecture
    nearly = next(
        a
        for a in (space.sample_balanced(rng) for _ in range(5000))
        if not budget.fits(a) and any(budget.fits(n) for n in neighbours(space, a))
    )
    assert budget.fits(sampler.repair(nearly, rng))
