"""A search without a model: a space small enough to enumerate, and a loss that is a formula."""

from __future__ import annotations

from moesaic.nas.config import Config, SearchConfig
from moesaic.nas.context import Context
from moesaic.nas.costs.price import Pricer
from moesaic.nas.executors import LocalExecutor
from moesaic.nas.search.budget import Budget, find_feasible, resolve_budget
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.loop import BudgetSearch, run_search
from moesaic.nas.search.samplers import make_sampler
from moesaic.nas.search.trials import TrialLog
from moesaic.search_spaces import Architecture, SearchSpace, load_space, preset_source
from moesaic.search_spaces.yaml_source import YamlSource
from moesaic.supernet import Evaluation, LayerLoad

SMALL = {
    "preset": "tiny",
    "depth": [1, 2],
    "layer": {
        "heads": [2],
        "experts": [1, 2],
        "expert_sizes": [16, 32],
        "dense_sizes": [32, 64],
        "routers": [{"kind": "top_k", "k": [1]}],
    },
}
PRICER = Pricer(Context(64, 16, 2))


def small_space() -> SearchSpace:
    return load_space(YamlSource("test", SMALL))


def tiny_space() -> SearchSpace:
    return load_space(preset_source("tiny"))


def budget_of(space: SearchSpace, **lines) -> Budget:
    return resolve_budget(Config.model_validate({"budget": lines, "space": "tiny"}).budget, space, PRICER)


def formula(architecture: Architecture) -> Evaluation:
    """Falls with active neurons and width; top-k layers send every token to the first k experts."""
    loss = 3.0 + 8.0 / architecture.output.width
    loads: list[LayerLoad | None] = []
    for layer in architecture.layers.values():
        part = layer.feed_forward
        loss += 4.0 / (8 + part.worst_active_neurons) + 0.01 * layer.attention.kv_heads
        k = part.router.max_experts if part.router else 0
        loads.append(LayerLoad(tuple(float(i < k) for i in range(part.experts))) if part.router else None)
    return Evaluation(loss, 0.01, 1000, tuple(loads))


class Stop:
    """True after a number of evaluations."""

    def __init__(self, after: int):
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def search(
    space,
    budget,
    log_path,
    config: SearchConfig,
    evaluate=formula,
    should_stop=lambda: False,
    seed=0,
    say=lambda text: None,
):
    """Run a search to its end, or raise what it raises; returns the log's trials."""
    feasible = FeasibleSampler(space, budget, find_feasible(space, budget))
    log = TrialLog(log_path)
    try:
        goal = BudgetSearch("", budget, lambda history: make_sampler(config, feasible, seed, history), log.trials)
        run_search(config, [goal], LocalExecutor(evaluate), log, seed, should_stop=should_stop, say=say)
    finally:
        log.close()
    return log.trials
