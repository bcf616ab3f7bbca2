"""The search of models that translate: genomes, surrogate, budgets, rivals and puzzle see cross-attention too."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from moesaic.nas.config import SearchConfig
from moesaic.nas.context import Context
from moesaic.nas.costs.price import Pricer
from moesaic.nas.search.budget import Budget, BudgetLine, cheapest, most_expensive
from moesaic.nas.search.rivals import uniform_layouts
from moesaic.nas.search.samplers.genome import Genome
from moesaic.nas.search.samplers.puzzle import Program
from moesaic.nas.search.samplers.scores import Scores, places_of
from moesaic.nas.search.samplers.surrogate import surrogate_features
from moesaic.search_spaces import Architecture, SearchSpace, load_space, preset_source
from moesaic.search_spaces.yaml_source import YamlSource
from moesaic.supernet import Evaluation
from tests.nas.search_tools import search, tiny_space
from tests.search_spaces.two_stacks import hat_like_space, two_stack_space

PRICER = Pricer(Context(64, 12, 2, source_length=16))
COSTS = ["flops", "parameters", "active_parameters", "memory"]


def spanning_space() -> SearchSpace:
    """Small enough to enumerate, with spans, and experts of equal sizes in the decoder."""
    layer = {"heads": [1, 2], "experts": [1], "dense_sizes": [16, 32]}
    mixed = {"heads": [1], "experts": [1, 2], "dense_sizes": [16], "expert_sizes": [16, 32], "equal_sizes": True,
             "routers": [{"kind": "top_k", "k": [1]}], "cross": {"heads": [1, 2], "span": [1, 2]}}  # fmt: skip
    plain = {"backbone": {"head_size": 16}, "encoder": {"width": [16, 32], "depth": [2], "layer": layer},
             "width": [16], "depth": [1, 2], "layer": mixed}  # fmt: skip
    return load_space(YamlSource("spanning", plain))


SPANNING = spanning_space()
MEMBERS = list(SPANNING)


def loss(architecture: Architecture) -> Evaluation:
    """A sum over parts, different at each place, and of the shape."""
    found = 4.0 - 0.05 * len(architecture.layers) - 0.001 * architecture.memory_width
    for number, layer in enumerate(architecture.layers.values(), start=1):
        found -= 0.002 * layer.feed_forward.neurons / number + 0.01 * layer.attention.heads * number
        if layer.cross is not None:
            found -= 0.02 * layer.cross.span + 0.015 * layer.cross.heads / number
    return Evaluation(found, 0.01, 1000, tuple(None for _ in architecture.layers))


@pytest.mark.parametrize("space", [two_stack_space(), SPANNING, hat_like_space(), load_space(preset_source("hat_wmt"))])
def test_a_genome_decodes_to_what_was_encoded(space):
    genome, rng = Genome(space), Random(0)
    for _ in range(100):
        architecture = space.sample_balanced(rng)
        genes = genome.encode(architecture)
        assert genome.decode(lambda gene, _, genes=genes: genes[gene]) == architecture
    for stack in ("encoder", "decoder"):
        assert (f"{stack}.0.cross" in genome.distributions) == (stack == "decoder")


def test_a_genome_of_equal_experts_has_one_gene_of_their_size():
    names = set(Genome(SPANNING).distributions)
    assert "decoder.0.size0" in names
    assert "decoder.0.size1" not in names
    assert not any("cross" in name for name in Genome(tiny_space()).distributions)


def test_the_surrogate_tells_cross_attention_apart():
    space = hat_like_space()
    start = space.largest
    (slot,) = list(start.layers)[-1:]
    others = [replace(start.layers[slot], cross=cross) for cross in space.layers[slot].crosses]
    found = {tuple(features(space, start.with_layers({slot: layer}))) for layer in others}
    assert len(found) == len(others) == 6
    assert {len(features(space, space.sample_balanced(Random(seed)))) for seed in range(20)} == {len(found.pop())}
    tiny = tiny_space()
    assert len(features(tiny, tiny.largest)) == 2 + 2 + 10 * tiny.depth


def features(space: SearchSpace, architecture: Architecture) -> list[float]:
    return surrogate_features(PRICER, architecture, PRICER.expected(architecture), space.layers)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("bind", ["expected", "worst"])
def test_the_cheapest_and_the_dearest_are_those_of_enumeration(cost, bind):
    price = PRICER.worst if bind == "worst" else PRICER.expected
    values = [price(member)[cost] for member in MEMBERS]
    assert price(cheapest(SPANNING, PRICER, cost, bind))[cost] == min(values)
    assert price(most_expensive(SPANNING, PRICER, cost, bind))[cost] == max(values)


def test_uniform_layouts_have_stacks_that_differ_in_cross_attention_alone():
    space = hat_like_space()
    for sparse in (False, True):
        layouts = uniform_layouts(space, sparse)
        assert len(layouts) == len(set(layouts))
        for one in layouts:
            parts = {(layer.attention, layer.feed_forward) for layer in one.layers.values()}
            crosses = {layer.cross for layer in one.stacks["decoder"].layers}
            assert len(parts) == len(crosses) == 1
        spans = {layer.cross.span for one in layouts for layer in one.stacks["decoder"].layers if layer.cross}
        assert spans == {1, 2, 3}
        assert all((one in space) for one in layouts if not sparse)


@pytest.mark.parametrize("name", ["hat_wmt", "hat_iwslt", "automoe_wmt", "translation"])
def test_uniform_layouts_of_the_presets_are_few(name):
    space = load_space(preset_source(name))
    found = {sparse: len(uniform_layouts(space, sparse)) for sparse in (False, True)}
    assert 0 < found[False] < 20_000
    assert found[True] < 20_000
    assert (found[True] > 0) == (not name.startswith("hat"))


def test_puzzle_chooses_cross_attention_and_finds_the_optimum(tmp_path):
    limit = sorted(PRICER.expected(member)["flops"] for member in MEMBERS)[len(MEMBERS) // 2]
    budget = Budget((BudgetLine("flops", limit, "expected"),), PRICER)
    trials = search(SPANNING, budget, tmp_path / "t.jsonl", SearchConfig(sampler="puzzle", trials=60), loss)
    scores = Scores.of(trials)
    assert scores is not None
    assert {kind for _, kind in places_of(scores.parent.layers)} == {"attention", "cross", "feed_forward"}
    assert all(scores.predict(a) == pytest.approx(loss(a).loss) for a in MEMBERS if scores.predict(a) is not None)
    found = Program(scores, budget).solve()
    predicted = [value for a in MEMBERS if budget.fits(a) and (value := scores.predict(a)) is not None]
    assert found in SPANNING
    assert scores.predict(found) == pytest.approx(min(predicted))


@pytest.mark.parametrize("sampler", ["random", "evolution", "puzzle", "nsga2", "tpe"])
def test_every_sampler_searches_two_stacks_inside_the_budget(sampler, tmp_path):
    space = hat_like_space()
    limit = PRICER.expected(space.sample_balanced(Random(0)))["flops"]
    budget = Budget((BudgetLine("flops", limit, "expected"),), PRICER)
    config = SearchConfig(sampler=sampler, trials=24, population=8)
    trials = search(space, budget, tmp_path / "t.jsonl", config, loss)
    evaluated = [trial.architecture for trial in trials if trial.state == "evaluated"]
    assert len(evaluated) >= 24
    assert all(one in space and PRICER.expected(one)["flops"] <= limit for one in evaluated)
