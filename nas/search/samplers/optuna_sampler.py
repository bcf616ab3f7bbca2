"""Optuna's NSGA-II and TPE on the flat genome, with hard budgets and exact restarts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from random import Random

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from moesaic.nas.config import SearchConfig
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.proposal import Proposal, SearchState, Skipped
from moesaic.nas.search.samplers.genome import Genome
from moesaic.nas.search.samplers.independent import RandomSampler
from moesaic.nas.search.trials import Trial
from moesaic.search_spaces import Architecture

_REFUSALS = 20
"""After this many refused proposals in a row, the last one is repaired and evaluated instead."""
_DUPLICATES = 20
"""After this many known proposals in a row the sampler has converged, and a random one is evaluated instead."""


class _OrderedNSGAII(NSGAIISampler):
    """NSGA-II with parents in the order of their trials from the first ask of a generation on. In Optuna that holds
    only from the second ask (read from a cache), so a search resumed between the two would draw other children."""

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)


class OptunaSampler:
    """Ask/tell in memory. Proposals over budget are at once told as pruned and replaced, so none is evaluated.

    Optuna keeps no random state between asks here: each ask gets a sampler seeded by the number of trials, so a
    study rebuilt from the log proposes what the old one would have (a study resumed with the plain seed would
    propose trial 0 again).
    """

    def __init__(self, feasible: FeasibleSampler, seed: int, config: SearchConfig, history: Sequence[Trial]):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.feasible, self.seed, self.config = feasible, seed, config
        self.genome = Genome(feasible.space)
        self.study = optuna.create_study(directions=[StudyDirection.MINIMIZE] * len(config.objectives))
        self.study.add_trials([frozen_trial(self.genome, trial) for trial in history])
        self._read = len(history)
        self._asked: dict[Architecture, optuna.Trial] = {}

    def propose(self, state: SearchState) -> Proposal | None:
        for ended in state.trials[self._read :]:
            if ended.ended:
                self._observe(ended)  # refused ones and duplicates were told when asked
        self._read = len(state.trials)
        skipped: list[Skipped] = []
        refusals = duplicates = 0
        while True:
            trial, architecture = self._ask()
            engine = {"params": trial.params, "system_attrs": dict(self._trials()[trial.number].system_attrs)}
            excess = self.feasible.budget.excess(architecture)
            known = state.seen.get(architecture.fingerprint)
            if max(excess.values()) > 0:
                skipped.append(Skipped("refused", architecture, engine))
                self._tell(trial, (), excess)
                refusals += 1
            elif known is not None:
                skipped.append(Skipped("duplicate", architecture, engine))
                self._tell(trial, known.values, known.excess)
                duplicates += 1
            elif not state.unknown(architecture):
                skipped.append(Skipped("duplicate", architecture, engine))  # a duplicate of a running one
                self._tell(trial, (), excess)
                duplicates += 1
            else:
                self._asked[architecture] = trial
                return Proposal(architecture, tuple(skipped), engine)
            if refusals == _REFUSALS or duplicates == _DUPLICATES:
                found = self._instead(architecture, state)
                # It takes the last trial's place in its generation, with its own genome.
                return found and Proposal(found, tuple(skipped), {**engine, "params": self.genome.encode(found)})

    def _instead(self, architecture: Architecture, state: SearchState) -> Architecture | None:
        """A new architecture inside the budget when the sampler offers none: the last one repaired, or else a random
        one; None when the space seems exhausted."""
        rng = Random(f"{self.seed}/instead/{len(self._trials())}")
        repaired = self.feasible.repair(architecture, rng)
        if state.unknown(repaired):
            return repaired
        drawn = RandomSampler(self.feasible, self.seed).propose(state)
        return drawn and drawn.architecture

    def _observe(self, trial: Trial) -> None:
        asked = self._asked.pop(trial.architecture, None)
        if asked is None:  # it replaced the one the study asked for
            self.study.add_trial(frozen_trial(self.genome, trial))
        else:
            self._tell(asked, trial.values, trial.excess)

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _ask(self) -> tuple[optuna.Trial, Architecture]:
        self.study.sampler = self._seeded()
        trial = self.study.ask()

        def gene(name: str, distribution: BaseDistribution) -> int:
            if isinstance(distribution, IntDistribution):
                return trial.suggest_int(name, distribution.low, distribution.high)
            assert isinstance(distribution, CategoricalDistribution)
            value = trial.suggest_categorical(name, distribution.choices)
            assert isinstance(value, int)
            return value

        return trial, self.genome.decode(gene)

    def _seeded(self) -> BaseSampler:
        seed = Random(f"{self.seed}/optuna/{len(self._trials())}").randrange(2**31)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if self.config.sampler == "nsga2":
                return _OrderedNSGAII(population_size=self.config.population, seed=seed)
            # Architectures running in other lanes count as bad, so that lanes explore different places.
            return TPESampler(multivariate=True, n_startup_trials=self.config.population, seed=seed, constant_liar=True)

    def _tell(self, trial: optuna.Trial, values: tuple[float, ...], excess: dict[str, float]) -> None:
        for name, value in excess.items():
            trial.set_constraint(name, value)
        if values:
            self.study.tell(trial, list(values))
        else:
            self.study.tell(trial, state=TrialState.PRUNED)


def frozen_trial(genome: Genome, trial: Trial) -> FrozenTrial:
    """A finished trial as Optuna stores it: complete with values, or pruned without."""
    frozen = create_trial(
        params=trial.engine.get("params") or genome.encode(trial.architecture),
        distributions=genome.distributions,
        values=list(trial.values) if trial.values else None,
        state=TrialState.COMPLETE if trial.values else TrialState.PRUNED,
        user_attrs={"fingerprint": trial.architecture.fingerprint, "state": trial.state, "costs": trial.costs},
        system_attrs=dict(trial.engine.get("system_attrs") or {}),
    )
    for name, value in trial.excess.items():
        frozen.set_constraint(name, value)
    return frozen
