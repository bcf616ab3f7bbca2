from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels import Routing, route
from moesaic.kernels import routing as routing_module
from moesaic.kernels.routing import PairWeights, Score


@dataclass(frozen=True)
class Case:
    logits: list[list[float]]
    max_experts: int
    threshold: float | None

    @property
    def experts(self) -> int:
        return len(self.logits[0])

    def route(self, score: Score = "softmax", weights: PairWeights = "sum") -> Routing:
        logits = torch.tensor(self.logits)
        return route(logits, max_experts=self.max_experts, threshold=self.threshold, score=score, weights=weights)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Logits on a grid: ties are exact, and whatever is no tie is far apart."""
    experts = draw(st.integers(1, 8))
    row = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=experts, max_size=experts)
    threshold = draw(st.none() | st.floats(0.05, 0.95))
    return Case(draw(st.lists(row, min_size=1, max_size=6)), draw(st.integers(1, experts)), threshold)


def naive_softmax(logits: list[float]) -> list[float]:
    parts = [math.exp(value - max(logits)) for value in logits]
    return [part / sum(parts) for part in parts]


def naive_choice(probabilities: list[float], max_experts: int, threshold: float | None) -> list[int]:
    """Experts of one token, from the definition."""
    ranking = sorted(range(len(probabilities)), key=lambda e: -probabilities[e])  # stable: lowest index first
    chosen: list[int] = []
    for expert in ranking[:max_experts]:
        ahead = math.fsum(probabilities[e] for e in chosen)
        if threshold is not None and chosen and ahead >= threshold:
            break
        chosen.append(expert)
    return sorted(chosen)


def clear_of_rounding(case: Case) -> bool:
    """Whether no sum of probabilities stands so near the threshold that rounding decides."""
    if case.threshold is None:
        return True
    for row in case.logits:
        ranked = sorted(naive_softmax(row), reverse=True)
        if any(abs(sum(ranked[:i]) - case.threshold) < 1e-5 for i in range(1, len(ranked) + 1)):
            return False
    return True


def experts_of(routing: Routing) -> Tensor:
    """[P] expert of each pair."""
    return torch.repeat_interleave(torch.arange(len(routing.load)), routing.load)


@given(cases())
def test_tokens_choose_as_the_definition_says(case: Case) -> None:
    assume(clear_of_rounding(case))
    routing = case.route()
    pairs = list(zip(experts_of(routing).tolist(), routing.tokens.tolist(), strict=True))
    expected = [
        (expert, token)
        for token, row in enumerate(case.logits)
        for expert in naive_choice(naive_softmax(row), case.max_experts, case.threshold)
    ]
    assert pairs == sorted(expected)  # by expert, then by token


@given(cases())
def test_offsets_and_load_count_the_pairs(case: Case) -> None:
    routing = case.route()
    assert routing.offsets.dtype == routing.tokens.dtype == torch.int64
    assert routing.offsets.shape == (case.experts + 1,)
    assert (routing.offsets[0], routing.offsets[-1]) == (0, len(routing.tokens))
    for expert in range(case.experts):
        tokens = routing.tokens[routing.offsets[expert] : routing.offsets[expert + 1]].tolist()
        assert tokens == sorted(set(tokens))
        assert routing.load[expert] == len(tokens)
    assert routing.load.sum() == len(routing.tokens)


@given(cases())
def test_every_token_has_one_to_max_experts_and_exactly_k_under_top_k(case: Case) -> None:
    counts = torch.bincount(case.route().tokens, minlength=len(case.logits))
    assert counts.min() >= 1
    assert counts.max() <= case.max_experts
    if case.threshold is None:
        assert (counts == case.max_experts).all()


@given(cases())
def test_normalised_weights_of_a_token_sum_to_one(case: Case) -> None:
    routing = case.route()
    sums = torch.zeros(len(case.logits)).index_add(0, routing.tokens, routing.weights)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@given(cases())
def test_weights_are_in_proportion_to_the_probabilities(case: Case) -> None:
    plain, normalised = case.route(weights="softmax"), case.route()
    expected = torch.tensor([naive_softmax(row) for row in case.logits])
    torch.testing.assert_close(plain.probabilities, expected)
    own = expected[plain.tokens, experts_of(plain)]
    torch.testing.assert_close(plain.weights, own)
    total = torch.zeros(len(case.logits)).index_add(0, plain.tokens, own)
    torch.testing.assert_close(normalised.weights, own / total[plain.tokens])


def naive_shares(masses: list[float]) -> list[float]:
    positive = [max(mass, 0.0) for mass in masses]
    total = sum(positive)
    return [mass / total if total else 1 / len(masses) for mass in positive]


@given(cases())
def test_mass_routers_choose_by_the_share_of_positive_masses_and_add_experts_as_they_are(case: Case) -> None:
    shares = [naive_shares(row) for row in case.logits]
    sums = ([sum(sorted(row, reverse=True)[:rank]) for rank in range(1, len(row) + 1)] for row in shares)
    assume(case.threshold is None or all(abs(total - case.threshold) > 1e-5 for row in sums for total in row))
    routing = case.route("mass", "one")
    torch.testing.assert_close(routing.probabilities, torch.tensor(shares))
    assert torch.equal(routing.weights, torch.ones(len(routing.tokens)))
    pairs = list(zip(experts_of(routing).tolist(), routing.tokens.tolist(), strict=True))
    expected = [
        (expert, token)
        for token, row in enumerate(shares)
        for expert in naive_choice(row, case.max_experts, case.threshold)
    ]
    assert pairs == sorted(expected)


@given(cases())
def test_sorting_chooses_the_experts_that_choosing_one_by_one_does(case: Case) -> None:
    assume(clear_of_rounding(case))
    probabilities = torch.tensor(case.logits).softmax(-1)
    one_by_one = routing_module._choose(probabilities, case.max_experts, case.threshold)
    assert torch.equal(routing_module._choose_sorted(probabilities, case.max_experts, case.threshold), one_by_one)


@pytest.mark.parametrize(("experts", "threshold", "expected"), [(5, 0.6, 3), (3, 2 / 3, 2), (10, 0.6, 6), (4, 0.5, 2)])
def test_equal_probabilities_keep_exactly_enough_experts_lowest_first(
    experts: int, threshold: float, expected: int
) -> None:
    routing = route(torch.zeros(2, experts), max_experts=experts, threshold=threshold)
    assert routing.load.tolist() == [2] * expected + [0] * (experts - expected)


def test_ties_under_top_k_go_to_the_lowest_experts() -> None:
    assert route(torch.zeros(3, 6), max_experts=2).load.tolist() == [3, 3, 0, 0, 0, 0]
    assert route(torch.tensor([[0.0, 1.0, 1.0, 1.0]]), max_experts=2).load.tolist() == [0, 1, 1, 0]
    assert route(torch.zeros(2, 512), max_experts=40).load.tolist() == [2] * 40 + [0] * 472


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits_choose_one_expert_without_nan(scale: float) -> None:
    logits = (torch.tensor([[0.0, 1.0, -1.0], [2.0, 1.0, 0.0]]) * scale).requires_grad_()
    routing = route(logits, max_experts=3, threshold=0.5)
    assert (routing.tokens.tolist(), routing.load.tolist()) == ([1, 0], [1, 1, 0])
    routing.weights.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert torch.equal(routing.weights, torch.ones(2))


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    routing = route(torch.zeros(tokens, 4), max_experts=2)
    assert routing.tokens.shape == routing.weights.shape == (2 * tokens,)
    assert routing.load.tolist() == [tokens, tokens, 0, 0]


@given(cases())
def test_experts_per_token_grow_with_the_threshold(case: Case) -> None:
    logits = torch.tensor(case.logits)
    counts = [
        torch.bincount(route(logits, max_experts=case.experts, threshold=t).tokens, minlength=len(logits))
        for t in (0.01, 0.2, 0.4, 0.6, 0.8, 0.99)
    ]
    for fewer, more in pairwise(counts):
        assert (fewer <= more).all()
    assert (counts[0] == 1).all()  # no softmax of 8 experts has a first share below 0.01


def test_softmax_is_taken_in_float32() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125]], dtype=torch.bfloat16)
    routing = route(logits, max_experts=3)
    assert routing.probabilities.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.probabilities, torch.tensor([naive_softmax([0.5, 0.25, 0.125])]))


# ---------------------------------------------------------------- gradients


def weight_matrix(routing: Routing) -> Tensor:
    """[T, E] weights, zero where a token does not use an expert."""
    weights = torch.zeros_like(routing.probabilities)
    return weights.index_put((routing.tokens, experts_of(routing)), routing.weights)


@given(case=cases(), normalise=st.booleans(), seed=st.integers(0, 1000))
def test_gradient_of_the_weights_is_that_of_the_formula(case: Case, normalise: bool, seed: int) -> None:
    """Softmax over all, divided by the sum over the chosen; log p where the only weight is 1 (straight-through)."""
    direction = torch.randn(len(case.logits), case.experts, generator=torch.Generator().manual_seed(seed))
    logits = torch.tensor(case.logits, requires_grad=True)
    routing = route(
        logits, max_experts=case.max_experts, threshold=case.threshold, weights="sum" if normalise else "softmax"
    )
    (weight_matrix(routing) * direction).sum().backward()

    expected_logits = torch.tensor(case.logits, dtype=torch.float64, requires_grad=True)
    objective = torch.zeros((), dtype=torch.float64)
    for token, row in enumerate(expected_logits):
        chosen = experts_of(routing)[routing.tokens == token]
        probabilities = row.exp() / row.exp().sum()
        values = probabilities[chosen]
        if normalise:
            values = probabilities[chosen].log() if len(chosen) == 1 else values / values.sum()
        objective = objective + (values * direction[token][chosen]).sum()
    objective.backward()
    assert logits.grad is not None
    assert expected_logits.grad is not None
    torch.testing.assert_close(logits.grad, expected_logits.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_the_router_of_a_token_with_one_expert_still_learns(threshold: float | None) -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    routing = route(logits, max_experts=1 if threshold is None else 3, threshold=threshold)
    assert routing.weights.tolist() == [1.0]
    routing.weights.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] > 0.1
    assert (logits.grad[0, 1:] < 0).all()


# ---------------------------------------------------------------- balance


@pytest.mark.parametrize("experts", [2, 3, 8])
@pytest.mark.parametrize("strength", [0.0, 1.0, 20.0])
def test_balance_loss_is_one_when_balanced(experts: int, strength: float) -> None:
    logits = strength * torch.eye(experts).repeat(4, 1)
    routing = route(logits, max_experts=1 if strength else experts)
    assert routing.load.unique().numel() == 1
    assert routing.balance_loss().item() == pytest.approx(1, abs=1e-5)


def test_balance_loss_is_the_number_of_experts_when_all_go_to_one() -> None:
    logits = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(7, 1)
    assert route(logits, max_experts=1).balance_loss().item() == pytest.approx(4)


def test_balance_loss_of_a_worked_example() -> None:
    # Two tokens, two experts, both top-1 at expert 0 with probabilities 3/4 and 1/2: 2 * (1 * 5/8 + 0 * 3/8)
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    assert route(logits, max_experts=1).balance_loss().item() == pytest.approx(1.25)


def test_balance_loss_pushes_down_the_overloaded_expert() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    route(logits, max_experts=1).balance_loss().backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


@given(st.integers(2, 16), st.floats(0.05, 0.95), st.integers(0, 10_000))
def test_a_threshold_never_keeps_more_than_its_share_of_the_experts(experts: int, threshold: float, seed: int) -> None:
    """What ``Router.for_experts`` rests on: j experts ranked first hold a mass of j / E or more."""
    logits = torch.randn(64, experts, generator=torch.Generator().manual_seed(seed)) * 0.1
    kept = route(logits, max_experts=experts, threshold=threshold)
    per_token = torch.bincount(kept.tokens, minlength=64)
    assert per_token.max() <= math.ceil(threshold * experts)
