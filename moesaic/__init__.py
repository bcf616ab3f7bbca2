"""Moesaic designs sparse Transformers under a compute budget.

The public interface: the names below, and those of ``moesaic.search_spaces``, ``moesaic.supernet`` and
``moesaic.kernels``. Each is loaded when it is first used. Import moesaic before torch: it bounds the time that torch's
threads spin, which is read when torch is loaded.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moesaic.auto_classes import add_when_loaded

if TYPE_CHECKING:
    from moesaic.nas import __version__
    from moesaic.nas.api import load, open_run, plan, run, translate
    from moesaic.nas.config import Config, DeviceConfig, ExecutorConfig, LatencyConfig, SearchConfig, load_config
    from moesaic.nas.context import Context
    from moesaic.nas.costs.analytic import flops
    from moesaic.nas.costs.compliance import worst_status
    from moesaic.nas.costs.hat import HatCosts, hat_costs
    from moesaic.nas.costs.latency.calibrate import Survey, calibrate
    from moesaic.nas.costs.latency.fitting import Accuracy, Drift, Interval, fit, leave_one_out
    from moesaic.nas.costs.latency.predictor import TERMS, LatencyPredictor, model_terms
    from moesaic.nas.costs.latency.probe import random_passes
    from moesaic.nas.costs.latency.timing import Series, Timer
    from moesaic.nas.costs.measure import measure_costs, peak_activation_bytes
    from moesaic.nas.costs.memory import activation_memory
    from moesaic.nas.costs.price import Pricer
    from moesaic.nas.costs.use import LayerUse, Occupancy, OccupancyRow
    from moesaic.nas.device import Device, choose_device, versions
    from moesaic.nas.executors import Executor, LocalExecutor, Outcome, Work, evaluate_all
    from moesaic.nas.executors.ray_lanes import RayExecutor
    from moesaic.nas.executors.tune_trials import TuneExecutor
    from moesaic.nas.inspect import Inspection, inspect_checkpoint
    from moesaic.nas.pipeline import run_stages
    from moesaic.nas.report.summary import Summary
    from moesaic.nas.search.budget import Budget, cost_ranges, find_feasible, resolve_budget
    from moesaic.nas.search.feasible import FeasibleSampler
    from moesaic.nas.search.loop import BudgetSearch, run_search
    from moesaic.nas.search.mirror import Mirror
    from moesaic.nas.search.pareto import hypervolume, hypervolumes, non_dominated
    from moesaic.nas.search.rivals import uniform_layouts
    from moesaic.nas.search.samplers import make_sampler
    from moesaic.nas.search.samplers.genome import Genome
    from moesaic.nas.search.thresholds import lower_thresholds_to_fit
    from moesaic.nas.search.trials import Trial, TrialLog, read_trials
    from moesaic.nas.stages.check_fidelity import load_trust
    from moesaic.nas.stages.run import BudgetRun, Run
    from moesaic.nas.stages.run_search import load_search
    from moesaic.nas.training.recipe import Recipe, single_recipe, supernet_recipe
    from moesaic.nas.training.trainer import Trainer
    from moesaic.nas.trust.correction import Correction, Judged, correction_features
    from moesaic.nas.trust.judges import correction_of
    from moesaic.nas.trust.ranking import agreement, kendall_tau, mean_interval
    from moesaic.nas.trust.scores import Difference, difference_over_seeds
    from moesaic.nas.trust.significance import holm
    from moesaic.nas.units import DIMENSIONS
    from moesaic.search_spaces import Architecture, MoesaicError, SearchSpace
    from moesaic.search_spaces.files import read_value, write_value
    from moesaic.supernet import Batch, Evaluation, Judge, Transformer
    from moesaic.supernet.convert import open_checkpoint, write_folder

_WHERE = {
    "nas": ["__version__"],
    "nas.api": ["load", "open_run", "plan", "run", "translate"],
    "nas.config": ["Config", "DeviceConfig", "ExecutorConfig", "LatencyConfig", "SearchConfig", "load_config"],
    "nas.context": ["Context"],
    "nas.costs.analytic": ["flops"],
    "nas.costs.compliance": ["worst_status"],
    "nas.costs.hat": ["HatCosts", "hat_costs"],
    "nas.costs.latency.calibrate": ["Survey", "calibrate"],
    "nas.costs.latency.fitting": ["Accuracy", "Drift", "Interval", "fit", "leave_one_out"],
    "nas.costs.latency.predictor": ["TERMS", "LatencyPredictor", "model_terms"],
    "nas.costs.latency.probe": ["random_passes"],
    "nas.costs.latency.timing": ["Series", "Timer"],
    "nas.costs.measure": ["measure_costs", "peak_activation_bytes"],
    "nas.costs.memory": ["activation_memory"],
    "nas.costs.price": ["Pricer"],
    "nas.costs.use": ["LayerUse", "Occupancy", "OccupancyRow"],
    "nas.device": ["Device", "choose_device", "versions"],
    "nas.executors": ["Executor", "LocalExecutor", "Outcome", "Work", "evaluate_all"],
    "nas.executors.ray_lanes": ["RayExecutor"],
    "nas.executors.tune_trials": ["TuneExecutor"],
    "nas.inspect": ["Inspection", "inspect_checkpoint"],
    "nas.pipeline": ["run_stages"],
    "nas.report.summary": ["Summary"],
    "nas.search.budget": ["Budget", "cost_ranges", "find_feasible", "resolve_budget"],
    "nas.search.feasible": ["FeasibleSampler"],
    "nas.search.loop": ["BudgetSearch", "run_search"],
    "nas.search.mirror": ["Mirror"],
    "nas.search.pareto": ["hypervolume", "hypervolumes", "non_dominated"],
    "nas.search.rivals": ["uniform_layouts"],
    "nas.search.samplers": ["make_sampler"],
    "nas.search.samplers.genome": ["Genome"],
    "nas.search.thresholds": ["lower_thresholds_to_fit"],
    "nas.search.trials": ["Trial", "TrialLog", "read_trials"],
    "nas.stages.check_fidelity": ["load_trust"],
    "nas.stages.run": ["BudgetRun", "Run"],
    "nas.stages.run_search": ["load_search"],
    "nas.training.recipe": ["Recipe", "single_recipe", "supernet_recipe"],
    "nas.training.trainer": ["Trainer"],
    "nas.trust.correction": ["Correction", "Judged", "correction_features"],
    "nas.trust.judges": ["correction_of"],
    "nas.trust.ranking": ["agreement", "kendall_tau", "mean_interval"],
    "nas.trust.scores": ["Difference", "difference_over_seeds"],
    "nas.trust.significance": ["holm"],
    "nas.units": ["DIMENSIONS"],
    "search_spaces": ["Architecture", "MoesaicError", "SearchSpace"],
    "search_spaces.files": ["read_value", "write_value"],
    "supernet": ["Batch", "Evaluation", "Judge", "Transformer"],
    "supernet.convert": ["open_checkpoint", "write_folder"],
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "DIMENSIONS",
    "TERMS",
    "Accuracy",
    "Architecture",
    "Batch",
    "Budget",
    "BudgetRun",
    "BudgetSearch",
    "Config",
    "Context",
    "Correction",
    "Device",
    "DeviceConfig",
    "Difference",
    "Drift",
    "Evaluation",
    "Executor",
    "ExecutorConfig",
    "FeasibleSampler",
    "Genome",
    "HatCosts",
    "Inspection",
    "Interval",
    "Judge",
    "Judged",
    "LatencyConfig",
    "LatencyPredictor",
    "LayerUse",
    "LocalExecutor",
    "Mirror",
    "MoesaicError",
    "Occupancy",
    "OccupancyRow",
    "Outcome",
    "Pricer",
    "RayExecutor",
    "Recipe",
    "Run",
    "SearchConfig",
    "SearchSpace",
    "Series",
    "Summary",
    "Survey",
    "Timer",
    "Trainer",
    "Transformer",
    "Trial",
    "TrialLog",
    "TuneExecutor",
    "Work",
    "__version__",
    "activation_memory",
    "agreement",
    "calibrate",
    "choose_device",
    "correction_features",
    "correction_of",
    "cost_ranges",
    "difference_over_seeds",
    "evaluate_all",
    "find_feasible",
    "fit",
    "flops",
    "hat_costs",
    "holm",
    "hypervolume",
    "hypervolumes",
    "inspect_checkpoint",
    "kendall_tau",
    "leave_one_out",
    "load",
    "load_config",
    "load_search",
    "load_trust",
    "lower_thresholds_to_fit",
    "make_sampler",
    "mean_interval",
    "measure_costs",
    "model_terms",
    "non_dominated",
    "open_checkpoint",
    "open_run",
    "peak_activation_bytes",
    "plan",
    "random_passes",
    "read_trials",
    "read_value",
    "resolve_budget",
    "run",
    "run_search",
    "run_stages",
    "single_recipe",
    "supernet_recipe",
    "translate",
    "uniform_layouts",
    "versions",
    "worst_status",
    "write_folder",
    "write_value",
]

# A thread of GNU OpenMP that waits for the others spins thirty times as long by default, on a processor that they may
# need: beside a busy program, trainings of some seconds a step were seen. experiments/spin has the measurements that
# chose this value. Lanes and workers inherit it.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"

add_when_loaded()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"moesaic.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
