"""Drawing inside budgets that leave almost nothing of the space, against enumeration."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from moesaic.nas.search.budget import Budget, BudgetLine, find_feasible
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.search_spaces import SearchSpace, load_space, preset_source
from moesaic.search_spaces.yaml_source import YamlSource
from tests.nas.search_tools import PRICER

TIGHT = 0.001
SPACE = {"preset": "tiny", "layer": {"experts": [1, 2, 4], "expert_sizes": [16, 48], "routers": [{"kind": "top_k"}]}}


def tight(space: SearchSpace, cost: str, share: float, sample) -> FeasibleSampler:
    """A budget that ``share`` of the ``sample`` meets."""
    limit = float(np.quantile([PRICER.expected(a)[cost] for a in sample], share)) * (1 + 1e-9)
    budget = Budget((BudgetLine(cost, limit, "expected"),), PRICER)
    return FeasibleSampler(space, budget, find_feasible(space, budget))


@pytest.fixture(scope="module")
def small():
    layer = {**SPACE["layer"], "routers": [{"kind": "top_k", "k": [1, 2]}]}
    space = load_space(YamlSource("test", {**SPACE, "layer": layer}))
    return space, list(space)


@pytest.mark.parametrize("cost", ["flops", "parameters"])
def test_draws_in_a_thousandth_of_the_space_reach_every_member_of_it(small, cost):
    space, members = small
    feasible = tight(space, cost, TIGHT, members)
    inside = [a for a in members if feasible.budget.fits(a)]
    assert 10 <= len(inside) <= 0.002 * len(members)
    rng = Random(0)
    drawn = Counter(feasible.sample(rng) for _ in range(40 * len(inside)))
    assert set(drawn) == set(inside)
    assert drawn.most_common(1)[0][1] < 40 * 15, "no member takes most of the draws"


def test_a_draw_in_a_thousandth_of_a_large_space_prices_few_members(monkeypatch):
    """Rejections and one walk: the number of members priced is bounded, whatever the budget."""
    space, rng = load_space(preset_source("small")), Random(0)
    feasible = tight(space, "flops", TIGHT, [space.sample_balanced(rng) for _ in range(5000)])
    priced = []
    fits = Budget.fits
    monkeypatch.setattr(Budget, "fits", lambda self, a, expected=None: priced.append(a) or fits(self, a, expected))
    drawn = [feasible.sample(rng) for _ in range(50)]
    assert len(priced) <= 50 * (64 + 60)
    assert all(map(feasible.budget.fits, drawn))
    assert len(set(drawn)) >= 40


def test_repair_ends_inside_and_leaves_what_fits_alone(small):
    space, members = small
    feasible, rng = tight(space, "flops", 0.05, members), Random(0)
    for _ in range(50):
        architecture = space.sample_balanced(rng)
        repaired = feasible.repair(architecture, rng)
        assert feasible.budget.fits(repaired)
        assert repaired in space
        assert repaired == architecture or not feasible.budget.fits(architecture)
