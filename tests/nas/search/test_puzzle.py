"""Integer programming over scores of parts: against enumeration, under several budgets, from a log alone."""

from functools import partial
from itertools import product

import numpy as np
import pytest

from moesaic.nas.config import SearchConfig
from moesaic.nas.executors.local import LocalExecutor
from moesaic.nas.search.budget import find_feasible
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.loop import BudgetSearch, run_search
from moesaic.nas.search.samplers import puzzle
from moesaic.nas.search.samplers.puzzle import Program, PuzzleSampler, radical_inverse
from moesaic.nas.search.samplers.scores import Scores, additivity, part_of, places_of, role_of, with_part
from moesaic.nas.search.trials import TrialLog, read_trials
from moesaic.search_spaces import Interrupted
from moesaic.supernet import Evaluation
from tests.nas.search_tools import PRICER, Stop, budget_of, formula, search, small_space, tiny_space


def additive(architecture) -> Evaluation:
    """A sum over parts, different at each position, and of width and depth."""
    layers = list(architecture.layers.values())
    loss = 4.0 - 0.002 * architecture.output.width - 0.1 * len(layers)
    for position, layer in enumerate(layers):
        part = layer.feed_forward
        loss -= (0.02 + 0.01 * position) * part.worst_active_neurons**0.5 + 0.003 * part.experts
        loss -= 0.01 * layer.attention.heads / (1 + position)
    return Evaluation(loss, 0.01, 1000, tuple(None for _ in layers))


def config(trials: int) -> SearchConfig:
    return SearchConfig(sampler="puzzle", trials=trials, population=40)


def scored(space, budget, tmp_path, trials=50, evaluate=formula):
    return search(space, budget, tmp_path / "t.jsonl", config(trials), evaluate)


@pytest.mark.parametrize("lines", [{"flops": "70%"}, {"parameters": "60%"}, {"flops": "60%", "memory": "95%"}])
def test_the_optimum_is_that_of_enumeration_under_any_limits(lines, tmp_path):
    """With scores of every part: the programme's model of losses against a sum made here, over all members."""
    space = small_space()
    scores = Scores.of(scored(space, budget_of(space, flops="99%"), tmp_path))
    assert scores is not None
    budget = budget_of(space, **lines)
    program = Program(scores, budget, ("flops", "parameters"))
    predicted = {a: loss for a in space if budget.fits(a) and (loss := scores.predict(a)) is not None}
    assert len(predicted) > 20
    known = []
    for cap in (1.0, 0.9, 0.7, 0.5):
        limit = cap * max(PRICER.expected(a)["flops"] for a in predicted)
        allowed = [a for a in predicted if PRICER.expected(a)["flops"] <= limit and a not in known]
        best = program.solve({"flops": limit}, known)
        if not allowed:
            assert best is None
            continue
        assert best in allowed
        assert predicted[best] == pytest.approx(min(predicted[a] for a in allowed), abs=1e-7)
        known.append(best)


def test_where_losses_add_up_every_prediction_is_exact(tmp_path):
    space = small_space()
    trials = scored(space, budget_of(space, flops="80%"), tmp_path, evaluate=additive)
    scores = Scores.of(trials)
    assert scores is not None
    assert all(scores.predict(a) == pytest.approx(additive(a).loss) for a in space if scores.predict(a) is not None)
    error = additivity(trials)
    assert error is not None
    assert error["mean_absolute_error"] == pytest.approx(0, abs=1e-9)
    assert error["tau"] == pytest.approx(1)
    best = min(t.loss for t in trials if t.feasible)
    assert best == pytest.approx(min(additive(a).loss for a in space if budget_of(space, flops="80%").fits(a)))


def test_scores_come_first_and_are_the_differences_of_trials(tmp_path):
    space = small_space()
    trials = scored(space, budget_of(space, flops="80%"), tmp_path)
    roles = [role_of(trial) for trial in trials]
    assert roles[0] == "parent"
    assert roles.index("solution") > max(i for i, role in enumerate(roles) if role in ("parent", "part"))
    scores = Scores.of(trials)
    assert scores is not None
    parent = scores.parent
    for place in places_of(parent.layers):
        for part, delta in scores.deltas[place].items():
            changed = with_part(parent, place, part)
            assert part_of(changed, place) == part
            assert delta == pytest.approx(formula(changed).loss - formula(parent).loss)


def test_a_new_budget_is_solved_from_the_log_without_an_evaluation(tmp_path):
    space = small_space()
    scored(space, budget_of(space, flops="80%"), tmp_path)
    scores = Scores.of(read_trials(tmp_path / "t.jsonl"))
    assert scores is not None
    for flops, parameters in product(("45%", "60%"), ("50%", "80%")):
        budget = budget_of(space, flops=flops, parameters=parameters)
        found = Program(scores, budget).solve()
        assert found is not None
        assert budget.fits(found)
        assert found in space


def test_a_search_among_solutions_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    space = tiny_space()
    budget = budget_of(space, flops="60%", memory="97%")
    run = partial(search, space, budget, config=SearchConfig(sampler="puzzle", trials=60, population=8))
    whole = run(log_path=tmp_path / "whole")
    for after in (5, 40):
        with pytest.raises(Interrupted):
            run(log_path=tmp_path / "parts", should_stop=Stop(after))
    parts = run(log_path=tmp_path / "parts")
    assert sum(role_of(trial) == "solution" for trial in whole) > 10
    assert [t.architecture for t in parts] == [t.architecture for t in whole]
    assert all(budget.fits(t.architecture) for t in whole)


@pytest.mark.parametrize("budgets", [2, 3])
def test_each_of_several_budgets_goes_through_all_levels(budgets, tmp_path, monkeypatch):
    """With levels in turn, the second of two would get the odd ones, which are all tight: none near its limit."""
    space, levels, solve = small_space(), dict[int, list[int]](), PuzzleSampler._solution

    def noted(sampler, scores, state, number):
        levels.setdefault(id(sampler), []).append(number)
        return solve(sampler, scores, state, number)

    scored(space, budget_of(space, flops="99%"), tmp_path)
    scores = Scores.of(read_trials(tmp_path / "t.jsonl"))
    monkeypatch.setattr(PuzzleSampler, "_solution", noted)

    def searches(log: TrialLog) -> list[BudgetSearch]:
        found = []
        for number, share in enumerate(("80%", "60%", "70%")[:budgets]):
            budget = budget_of(space, flops=share)
            sampler = PuzzleSampler(
                FeasibleSampler(space, budget, find_feasible(space, budget)), 0, ("flops",), 12, scores
            )
            found.append(BudgetSearch(str(number), budget, lambda history, sampler=sampler: sampler, log.trials))
        return found

    log = TrialLog(tmp_path / "log.jsonl")
    run_search(config(6), searches(log), LocalExecutor(formula), log, 0)
    assert list(levels.values()) == [list(range(6))] * budgets
    levels.clear()
    run_search(config(9), searches(log), LocalExecutor(formula), log, 0)  # continued from the log
    log.close()
    assert list(levels.values()) == [list(range(6, 9))] * budgets


def test_a_programme_does_not_grow_with_the_log(tmp_path, monkeypatch):
    sizes, milp = [], puzzle.milp

    def counted(*args, constraints, **options):
        sizes.append(len(constraints[1][0]))
        return milp(*args, constraints=constraints, **options)

    monkeypatch.setattr(puzzle, "milp", counted)
    space = tiny_space()
    trials = search(space, budget_of(space, flops="60%"), tmp_path / "t", SearchConfig(sampler="puzzle", trials=120))
    solutions = [t for t in trials if role_of(t) == "solution"]
    assert len(solutions) > 40
    assert max(sizes) <= 1 + 1 + 20, "a budget line, a cap, and the known solutions ruled out"
    assert len(sizes) < 2 * len(solutions)


def test_known_solutions_are_ruled_out_in_the_order_of_their_predicted_losses(tmp_path):
    space = small_space()
    budget = budget_of(space, flops="90%")
    scores = Scores.of(scored(space, budget, tmp_path))
    assert scores is not None
    program = Program(scores, budget, ("flops",))
    predicted = {a: loss for a in space if (loss := scores.predict(a)) is not None}
    program.remember((a.fingerprint, a) for a in predicted)
    program.remember((a.fingerprint, a) for a in predicted)  # the second time it is no news
    cap = float(np.median([PRICER.expected(a)["flops"] for a in predicted]))
    inside = sorted((loss, a.fingerprint) for a, loss in predicted.items() if PRICER.expected(a)["flops"] <= cap)
    found = program.best_known({"flops": cap}, 10)
    assert [predicted[a] for a in found] == pytest.approx([loss for loss, _ in inside[:10]])
    assert len(program.best_known({}, 10_000)) == len(predicted)


def test_scores_from_a_growing_log_are_those_of_the_whole_log(tmp_path):
    space = small_space()
    budget = budget_of(space, flops="80%")
    trials = scored(space, budget, tmp_path)
    sampler = PuzzleSampler(FeasibleSampler(space, budget, find_feasible(space, budget)), 0, ("flops",), 20)
    for count in range(0, len(trials) + 1, 7):
        assert sampler._scores_of(trials[:count]) == Scores.of(trials[:count])


def test_what_failed_has_no_score_and_is_not_chosen(tmp_path):
    def fails(architecture):
        if any(layer.feed_forward.experts == 2 for layer in architecture.layers.values()):
            raise RuntimeError("out of memory")
        return formula(architecture)

    space = small_space()
    trials = scored(space, budget_of(space, flops="80%"), tmp_path, 40, fails)
    solutions = [t for t in trials if role_of(t) == "solution"]
    assert solutions
    assert all(t.state == "evaluated" for t in solutions)


def test_a_log_without_a_parent_has_no_scores_and_one_without_solutions_no_error(tmp_path):
    space = small_space()
    trials = search(space, budget_of(space, flops="80%"), tmp_path / "r", SearchConfig(sampler="random", trials=10))
    assert Scores.of(trials) is None
    assert additivity(trials) is None


def test_the_parent_is_inside_a_budget_that_no_uniform_network_meets():
    space = tiny_space()
    budget = budget_of(space, flops="60%")
    inside = find_feasible(space, budget)
    sampler = PuzzleSampler(FeasibleSampler(space, budget, inside), 0, ("flops",), 4)
    plan = sampler.plan(inside)
    assert next(iter(plan.values())) == "parent"
    assert all(budget.fits(a) and a in space for a in plan)


def test_levels_halve_the_gaps():
    assert [radical_inverse(i, 2) for i in range(6)] == [0, 0.5, 0.25, 0.75, 0.125, 0.625]
    assert sorted(radical_inverse(i, 3) for i in range(9)) == pytest.approx([i / 9 for i in range(9)])
