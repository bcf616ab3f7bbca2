"""Samplers propose the next architecture; one module per sampler.

``random``, ``evolution``, integer programming over scores of parts (``puzzle``), Optuna's ``nsga2`` and ``tpe``.

Every sampler is a function of the seed, the trials so far and what is running: rebuilt from the trial log, it
continues exactly. With several lanes, the order in which trials end depends on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.nas.config import SearchConfig
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.proposal import Sampler
from moesaic.nas.search.samplers.evolution import EvolutionSampler, corners, seed_layouts
from moesaic.nas.search.samplers.independent import RandomSampler
from moesaic.nas.search.samplers.puzzle import PuzzleSampler
from moesaic.nas.search.samplers.scores import Scores
from moesaic.nas.search.trials import Trial


def make_sampler(
    config: SearchConfig,
    feasible: FeasibleSampler,
    seed: int,
    history: Sequence[Trial],
    scores: Scores | None = None,
) -> Sampler:
    """The sampler that ``config`` names, in its state after the trials of ``history``, in the order of their log.
    ``scores`` are those of parts, where they are known before the search."""
    costs = tuple(name for name in config.objectives if name != "loss")
    if config.sampler == "random":
        return RandomSampler(feasible, seed)
    if config.sampler == "evolution":
        seeds = dict.fromkeys((*corners(feasible, costs), *seed_layouts(feasible, config.population // 2)))
        return EvolutionSampler(feasible, seed, config.population, costs, tuple(seeds))
    if config.sampler == "puzzle":
        return PuzzleSampler(feasible, seed, costs, config.population // 2, scores)
    from moesaic.nas.search.samplers.optuna_sampler import OptunaSampler  # imported here: optuna takes a second

    return OptunaSampler(feasible, seed, config, history)
