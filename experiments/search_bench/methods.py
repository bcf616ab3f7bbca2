"""The compared searches. Each returns the architectures that it evaluated, in order."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler

from moesaic import (
    Architecture,
    Budget,
    BudgetSearch,
    Evaluation,
    FeasibleSampler,
    Genome,
    LocalExecutor,
    SearchConfig,
    SearchSpace,
    TrialLog,
    find_feasible,
    make_sampler,
    run_search,
)
from moesaic.search_spaces import Attention, FeedForward, Layer

Evaluate = Callable[[Architecture], Evaluation]
Search = Callable[[SearchSpace, Budget, Evaluate, int, int], list[Architecture]]
"""(space, budget, evaluate, seed, number of evaluations) to the evaluated architectures."""


def moesaic(
    sampler: str, space: SearchSpace, budget: Budget, evaluate: Evaluate, seed: int, count: int
) -> list[Architecture]:
    """A sampler of this tool in its own loop, with default settings."""
    config = SearchConfig.model_validate({"sampler": sampler, "trials": count})
    feasible = FeasibleSampler(space, budget, find_feasible(space, budget))
    with tempfile.TemporaryDirectory() as folder, closing(TrialLog(Path(folder) / "trials.jsonl")) as log:
        search = BudgetSearch("", budget, partial(make_sampler, config, feasible, seed))
        run_search(config, [search], LocalExecutor(evaluate), log, seed)
    return [trial.architecture for trial in log.trials if trial.ended]


def plain(
    make: Callable[[int], BaseSampler], space: SearchSpace, budget: Budget, evaluate: Evaluate, seed: int, count: int
) -> list[Architecture]:
    """Optuna as in its documentation: conditional parameters, and budgets as constraints. Every proposal is evaluated,
    also if it is over budget or a duplicate."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=make(seed))
    asked = []

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        architecture = suggest(trial, space)
        asked.append(architecture)
        evaluation = evaluate(architecture)
        measured = budget.pricer.measured(architecture, evaluation.loads)
        for name, excess in (budget.excess(architecture) | budget.measured_excess(measured)).items():
            trial.set_constraint(name, excess)
        return evaluation.loss, measured["flops"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental features
        study.optimize(objective, n_trials=count)
    return asked


def suggest(trial: optuna.Trial, space: SearchSpace) -> Architecture:
    """An architecture from one parameter per choice."""

    def choose(name, values):
        return values[trial.suggest_categorical(name, list(range(len(values))))]

    layers, stack = [], space.decoder
    width, depth = choose("width", stack.widths), choose("depth", stack.depths)
    for i, layer in enumerate(stack.layers[:depth]):
        attention: Attention = choose(f"{i}.attention", layer.attentions)
        group = choose(f"{i}.experts", layer.groups)
        sizes = tuple(choose(f"{i}.{group.experts}.size{j}", group.sizes) for j in range(group.experts))
        router = choose(f"{i}.{group.experts}.router", group.routers)
        shared = choose(f"{i}.{group.experts}.shared", group.shared_sizes)
        layers.append(Layer(attention, FeedForward(sizes, router, shared)))
    return space.build({"decoder": stack.build(width, tuple(layers))})


POPULATION, PARENTS, MUTATED, CROSSED, REDRAWN = 125, 25, 50, 50, 0.3
"""AutoMoE, arXiv 2210.07535, and HAT, arXiv 2005.14187: ``fairseq/evolution.py``."""


def automoe(space: SearchSpace, budget: Budget, evaluate: Evaluate, seed: int, count: int) -> list[Architecture]:
    """AutoMoE's published evolution: fitness is the loss alone, and proposals over budget are redrawn. AutoMoE
    evaluates parents again in each generation; these evaluations are not counted."""
    return list(islice(_automoe(space, budget, evaluate, Random(f"{seed}/automoe")), count))


def _automoe(space: SearchSpace, budget: Budget, evaluate: Evaluate, rng: Random) -> Iterator[Architecture]:
    genome = Genome(space)
    sizes = {name: _size(distribution) for name, distribution in genome.distributions.items()}

    def inside(draw: Callable[[], dict[str, int]]) -> dict[str, int]:
        while True:
            genes = draw()
            if budget.fits(_decode(genome, genes)):
                return genes

    def anything() -> dict[str, int]:
        return {name: rng.randrange(size) for name, size in sizes.items()}

    def mutated(parents: list[dict[str, int]]) -> dict[str, int]:
        parent = rng.choice(parents)
        return {name: rng.randrange(sizes[name]) if rng.random() < REDRAWN else gene for name, gene in parent.items()}

    def crossed(parents: list[dict[str, int]]) -> dict[str, int]:
        first, second = rng.choice(parents), rng.choice(parents)
        return {name: rng.choice((first[name], second[name])) for name in sizes}

    losses: dict[Architecture, float] = {}
    population = [inside(anything) for _ in range(POPULATION)]
    while True:
        for genes in population:
            architecture = _decode(genome, genes)
            if architecture not in losses:
                losses[architecture] = evaluate(architecture).loss
                yield architecture
        parents = sorted(population, key=lambda genes: losses[_decode(genome, genes)])[:PARENTS]
        population = parents + [inside(partial(mutated, parents)) for _ in range(MUTATED)]
        population += [inside(partial(crossed, parents)) for _ in range(CROSSED)]


def _decode(genome: Genome, genes: dict[str, int]) -> Architecture:
    return genome.decode(lambda name, _: genes[name])


def _size(distribution: BaseDistribution) -> int:
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    assert isinstance(distribution, IntDistribution)
    return distribution.high + 1


METHODS: dict[str, Search] = {
    "evolution": partial(moesaic, "evolution"),
    "puzzle": partial(moesaic, "puzzle"),
    "nsga2": partial(moesaic, "nsga2"),
    "tpe": partial(moesaic, "tpe"),
    "random": partial(moesaic, "random"),
    "Optuna's NSGA-II, plain": partial(plain, lambda seed: NSGAIISampler(seed=seed)),
    "Optuna's TPE, plain": partial(plain, lambda seed: TPESampler(seed=seed)),
    "AutoMoE's evolution": automoe,
}
"""The first five stay inside the budget by construction and use the tool's own handling of duplicates."""
