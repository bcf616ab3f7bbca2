"""What every sampler must do. A suite is a subclass of ``SamplerContract`` that names a sampler."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from moesaic.nas.config import SearchConfig
from moesaic.nas.search.loop import result_of
from moesaic.nas.search.trials import Trial
from moesaic.search_spaces import Architecture, Interrupted, SearchSpace
from moesaic.supernet import Evaluation
from tests.nas.search_tools import PRICER, Stop, budget_of, formula, search, small_space, tiny_space
from tests.search_spaces.pruned import pruned_space


def key(trials: list[Trial]) -> list[tuple]:
    """What must be the same in two searches of one seed."""
    return [(t.number, t.state, t.architecture.fingerprint, t.values) for t in trials]


class SamplerContract:
    sampler: ClassVar[str]
    """As ``search.sampler`` names it."""
    trials: ClassVar[int] = 40
    stops: ClassVar[list[list[int]]] = [[0, 1], [10, 3, 12]]
    """After how many evaluations each process of an interrupted search is asked to stop."""
    exhausts: ClassVar[bool] = True
    """Whether it is quick enough to go through a whole space."""

    def config(self, trials: int | None = None) -> SearchConfig:
        return SearchConfig.model_validate(
            {"sampler": self.sampler, "trials": min(trials or self.trials, self.trials), "population": 8}
        )

    @pytest.mark.parametrize("make_space", [tiny_space, pruned_space])
    def test_nothing_over_budget_is_evaluated_and_nothing_twice(
        self, tmp_path: Path, make_space: Callable[[], SearchSpace]
    ) -> None:
        space, asked = make_space(), []
        budget = budget_of(space, flops="55%", parameters="50%")

        def evaluate(architecture: Architecture) -> Evaluation:
            asked.append(architecture)
            return formula(architecture)

        trials = search(space, budget, tmp_path / "t.jsonl", self.config(), evaluate)
        assert len(asked) == len(set(asked)) == self.trials
        for architecture in asked:
            assert architecture in space
            assert PRICER.expected(architecture)["flops"] <= budget.lines[0].limit
            assert PRICER.expected(architecture)["parameters"] <= budget.lines[1].limit
        refused = [t for t in trials if t.state == "refused"]
        assert all(max(t.excess.values()) > 0 and not t.values for t in refused)

    def test_a_stopped_search_continues_to_the_same_result(self, tmp_path: Path) -> None:
        space = tiny_space()
        budget = budget_of(space, flops="45%")
        whole = search(space, budget, tmp_path / "whole.jsonl", self.config())
        for number, stops in enumerate(self.stops):
            path = tmp_path / f"parts{number}.jsonl"
            for after in stops:
                with pytest.raises(Interrupted):
                    search(space, budget, path, self.config(), should_stop=Stop(after))
            parts = search(space, budget, path, self.config())
            assert key(parts) == key(whole)
            assert path.read_text().count("\n") == len(whole)

    def test_the_search_is_a_function_of_the_seed(self, tmp_path: Path) -> None:
        space = tiny_space()
        budget = budget_of(space, flops="60%")
        first = search(space, budget, tmp_path / "1", self.config(12), seed=1)
        assert key(search(space, budget, tmp_path / "2", self.config(12), seed=1)) == key(first)
        assert key(search(space, budget, tmp_path / "3", self.config(12), seed=2)) != key(first)

    def test_an_exhausted_space_ends_the_search(self, tmp_path: Path) -> None:
        space = small_space()
        budget = budget_of(space, flops="40%")
        inside = [a for a in space if budget.fits(a)]
        config = self.config().model_copy(update={"trials": 10_000 if self.exhausts else 5})
        evaluated = [t for t in search(space, budget, tmp_path / "t.jsonl", config) if t.state == "evaluated"]
        assert len(evaluated) <= len(inside)
        assert len(evaluated) >= (0.9 * len(inside) if self.exhausts else 5)

    def test_more_trials_continue_the_same_history(self, tmp_path: Path) -> None:
        space = tiny_space()
        budget = budget_of(space, flops="60%")
        short = search(space, budget, tmp_path / "t.jsonl", self.config(9))
        longer = search(space, budget, tmp_path / "t.jsonl", self.config(14))
        assert key(longer)[: len(short)] == key(short)
        assert key(longer) == key(search(space, budget, tmp_path / "u.jsonl", self.config(14)))

    def test_a_poisoned_architecture_does_not_end_a_search(self, tmp_path: Path) -> None:
        def evaluate(architecture: Architecture) -> Evaluation:
            good = formula(architecture)
            poisoned = architecture.output.width == 32
            return Evaluation(math.nan, math.nan, good.tokens, good.loads) if poisoned else good

        space = tiny_space()
        trials = search(space, budget_of(space, flops="90%"), tmp_path / "t.jsonl", self.config(), evaluate)
        states = Counter(t.state for t in trials)
        assert states["failed"] > 0
        assert states["failed"] + states["evaluated"] == self.trials
        result = result_of(trials)
        assert result is not None
        assert all(t.architecture.output.width == 48 for t in result.front)
