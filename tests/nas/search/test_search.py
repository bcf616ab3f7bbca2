"""What a search makes of its trials: the front, several budgets, rivals, the mirror."""

import math
from collections import Counter
from contextlib import closing
from functools import partial
from itertools import pairwise, zip_longest
from random import Random

import numpy as np
import pytest

from moesaic.nas.config import SearchConfig
from moesaic.nas.executors import LocalExecutor
from moesaic.nas.search.budget import find_feasible
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.loop import BudgetSearch, hypervolume_history, result_of, run_search
from moesaic.nas.search.rivals import judge_rivals, uniform_layouts
from moesaic.nas.search.samplers import make_sampler
from moesaic.nas.search.samplers.evolution import EvolutionSampler
from moesaic.nas.search.samplers.genome import Genome
from moesaic.nas.search.trials import TrialLog
from moesaic.search_spaces import Interrupted, load_space, preset_source
from moesaic.supernet import Evaluation
from tests.contracts.samplers import key
from tests.nas.search_tools import Stop, budget_of, formula, search, small_space, tiny_space
from tests.search_spaces.pruned import pruned_space


def config(sampler: str, trials: int = 40, **changes) -> SearchConfig:
    return SearchConfig(sampler=sampler, trials=trials, population=8, **changes)


def test_measured_routing_over_budget_is_never_chosen(tmp_path):
    space = tiny_space()
    budget = budget_of(space, flops="45%")
    trials = search(space, budget, tmp_path / "t.jsonl", config("random", 80))
    over = [t for t in trials if t.state == "evaluated" and not t.feasible]
    assert over, "lopsided loads cost more than the even ones that were expected"
    result = result_of(trials)
    assert result is not None
    assert all(t.costs["flops"] <= budget.lines[0].limit for t in result.front)


def structured(architecture) -> Evaluation:
    """Each layer has a number of active neurons it should have: large, small, large, small."""
    loss = 3.0 + 20.0 / architecture.output.width
    for target, layer in zip_longest((300, 60, 250, 40), architecture.layers.values()):
        active = layer.feed_forward.worst_active_neurons if layer else 1
        loss += 0.1 * abs(math.log(active / target))
    return Evaluation(loss, 0.01, 1000, tuple(None for _ in architecture.layers))


def test_evolution_finds_better_architectures_than_random_draws(tmp_path):
    space = load_space(preset_source("small"))
    budget = budget_of(space, flops="40%")
    best = {}
    for sampler in ("random", "evolution"):
        found = []
        for seed in range(4):
            trials = search(space, budget, tmp_path / f"{sampler}{seed}", config(sampler, 150), structured, seed=seed)
            result = result_of(trials)
            assert result is not None
            found.append(result.best.loss)
        best[sampler] = np.mean(found)
    assert best["evolution"] < best["random"] - 0.02


def test_the_front_is_sorted_and_hypervolume_only_grows(tmp_path):
    space = tiny_space()
    trials = search(space, budget_of(space, flops="60%"), tmp_path / "t.jsonl", config("evolution"))
    result = result_of(trials)
    assert result is not None
    losses = [t.loss for t in result.front]
    assert losses == sorted(losses)
    assert result.best.loss == min(t.loss for t in trials if t.feasible)
    history = hypervolume_history(trials)
    assert [n for n, _ in history] == list(range(1, 41))
    assert all(b >= a for (_, a), (_, b) in pairwise(history))


def test_best_is_the_least_loss_whatever_the_order_of_objectives(tmp_path):
    space = tiny_space()
    trials = search(
        space, budget_of(space, flops="60%"), tmp_path / "t.jsonl", config("evolution", objectives=["flops", "loss"])
    )
    result = result_of(trials)
    assert result is not None
    assert result.best.loss == min(t.loss for t in trials if t.feasible)


@pytest.mark.parametrize("space", [tiny_space(), small_space(), pruned_space()])
def test_a_genome_decodes_to_what_was_encoded(space):
    genome, rng = Genome(space), Random(0)
    for _ in range(200):
        architecture = space.sample_balanced(rng)
        genes = genome.encode(architecture)
        assert set(genes) == set(genome.distributions)
        assert genome.decode(lambda gene, _, genes=genes: genes[gene]) == architecture
        drawn = {g: rng.randrange(_size(d)) for g, d in genome.distributions.items()}
        assert genome.decode(lambda gene, _, drawn=drawn: drawn[gene]) in space


def _size(distribution) -> int:
    return len(distribution.choices) if hasattr(distribution, "choices") else distribution.high + 1


def test_what_runs_in_another_lane_leaves_little_to_gain_at_its_place(tmp_path):
    space = small_space()
    budget = budget_of(space, flops="60%")
    trials = search(space, budget, tmp_path / "t.jsonl", config("random", 60))
    sampler = EvolutionSampler(FeasibleSampler(space, budget, find_feasible(space, budget)), 0, 8, ("flops",))
    sampler._read(trials)
    flops = sorted(trial.values[1] for trial in trials)
    limits = np.linspace(flops[0], flops[-1], 64)[:, None]
    rng = Random(0)
    children = sampler._priced(space.sample_balanced(rng) for _ in range(40))
    before = sampler._gains(children, (), limits)
    best = int(before.argmax())
    after = sampler._gains(children, (list(children)[best],), limits)
    assert after[best] < 0.2 * before[best]
    others = np.delete(before, best)
    assert np.delete(after, best).sum() > 0.5 * others.sum() > 0


def test_rivals_are_uniform_inside_the_budget_and_the_best_of_their_kind():
    space = tiny_space()
    budget = budget_of(space, flops="60%")
    judged = judge_rivals(space, budget, LocalExecutor(formula))
    assert all(few == sorted(few, key=lambda r: r.loss) for few in judged.values())
    rivals = {kind: few[0] for kind, few in judged.items()}
    assert set(rivals) == {"uniform", "dense"}
    for kind, rival in rivals.items():
        assert budget.fits(rival.architecture)
        (layer,) = set(rival.architecture.layers.values())
        part = layer.feed_forward
        assert (part.router is None) == (kind == "dense")
    for sparse, kind in ((False, "dense"), (True, "uniform")):
        layouts = [a for a in uniform_layouts(space, sparse) if budget.fits(a)]
        layouts.sort(key=lambda a: (-budget.pricer.expected(a)["flops"], a.fingerprint))
        assert rivals[kind].loss == min(formula(a).loss for a in layouts[:64])


def test_uniform_layouts_are_swept_over_every_router_of_the_space_and_top_2():
    space = tiny_space()
    found = {layer.feed_forward.router for a in uniform_layouts(space, sparse=True) for layer in a.layers.values()}
    assert found == {router for layer in space.layers.values() for g in layer.groups for router in g.routers} - {None}
    assert any(a not in small_space() for a in uniform_layouts(small_space(), sparse=True))


def test_several_budgets_share_their_evaluations_and_each_keeps_its_own_limit(tmp_path):
    """A search that is stopped and continued, too."""
    space = tiny_space()
    budgets = {"small": budget_of(space, flops="45%"), "large": budget_of(space, flops="80%")}
    asked = []

    def evaluate(architecture):
        asked.append(architecture)
        return formula(architecture)

    def searched(path, should_stop=lambda: False):
        log = TrialLog(path)
        searches = []
        for name, budget in budgets.items():
            feasible = FeasibleSampler(space, budget, find_feasible(space, budget))
            make = partial(make_sampler, config("evolution"), feasible, 0)
            searches.append(BudgetSearch(name, budget, make, log.trials))
        with closing(log):
            run_search(config("evolution"), searches, LocalExecutor(evaluate), log, should_stop=should_stop)
        return searches, log.trials

    searches, trials = searched(tmp_path / "whole.jsonl")
    assert len(asked) == len(set(asked)) == 80
    assert Counter(t.budget for t in trials if t.ended) == {"small": 40, "large": 40}
    for trial in trials:
        assert budgets[trial.budget].fits(trial.architecture) == (trial.state != "refused")
    for one in searches:
        inside = {a for a in asked if one.budget.fits(a)}
        assert {t.architecture for t in one.trials if t.feasible} <= inside
        assert {t.architecture for t in one.trials if t.ended} == set(asked)
        result = result_of(one.trials)
        assert result is not None
        assert all(t.costs["flops"] <= one.budget.lines[0].limit for t in result.front)
    small, large = (result_of(one.trials).best.loss for one in searches)
    assert large <= small, "what fits the small budget fits the large one"
    with pytest.raises(Interrupted):
        searched(tmp_path / "parts.jsonl", Stop(30))
    assert key(searched(tmp_path / "parts.jsonl")[1]) == key(trials)
