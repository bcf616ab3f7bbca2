"""Tests of the Triton kernels alone: their routing, lists longer than the pairs, operators that torch can trace.

test_sparse_ffn.py compares every implementation with the reference.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels import ACTIVATIONS, Bank, ExpertLayout, Routing, gpu, has_triton, routing, sparse_ffn
from tests.kernels.gpu_tools import DEVICE


def expected_routing(logits: Tensor, max_experts: int, threshold: float | None, normalise: bool) -> Routing:
    weights: routing.PairWeights = "sum" if normalise else "softmax"
    return routing.route(logits, max_experts=max_experts, threshold=threshold, weights=weights).in_token_order()


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """Logits on a grid, so that ties are exact, or all over the place."""
    tokens, experts = draw(st.integers(0, 40)), draw(st.sampled_from([2, 3, 5, 8, 17, 40]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    kind = draw(st.sampled_from(["grid", "normal", "equal", "huge", "tiny"]))
    values = torch.randn(tokens, experts, generator=generator)
    scale = {"grid": 1.0, "normal": 1.0, "equal": 0.0, "huge": 1e30, "tiny": 1e-30}[kind]
    return values.round() if kind == "grid" else values * scale


def assert_same_routing(found: Routing, expected: Routing) -> None:
    """``found`` may be on another device, and have room to spare."""
    found = found.trimmed()
    for name in ("offsets", "tokens", "slots", "token_offsets"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name))
    for name in ("weights", "probabilities"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), rtol=1e-5, atol=1e-7)


@given(values=logits(), max_experts=st.integers(1, 8), threshold=st.none() | st.sampled_from([0.013, 0.37, 0.71, 0.97]),
       normalise=st.booleans())  # fmt: skip
def test_routing_matches_the_reference_with_ties(
    values: Tensor, max_experts: int, threshold: float | None, normalise: bool
) -> None:
    max_experts = min(max_experts, values.shape[1])
    found = gpu.route(values.to(DEVICE), max_experts=max_experts, threshold=threshold, normalise=normalise)
    assert_same_routing(found, expected_routing(values, max_experts, threshold, normalise))


@pytest.mark.parametrize(("tokens", "experts", "max_experts"), [(40, 1024, 3), (1500, 64, 2), (5000, 8, 2)])
def test_routing_of_many_tokens_crosses_blocks_and_programs(tokens: int, experts: int, max_experts: int) -> None:
    values = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))
    for threshold in (None, 0.3):
        found = gpu.route(values.to(DEVICE), max_experts=max_experts, threshold=threshold)
        assert_same_routing(found, expected_routing(values, max_experts, threshold, True))


@settings(max_examples=20)
@given(values=logits(), max_experts=st.integers(1, 4), threshold=st.none() | st.sampled_from([0.37, 0.71]),
       normalise=st.booleans(), balance=st.booleans())  # fmt: skip
def test_gradient_of_the_logits_matches_the_reference(
    values: Tensor, max_experts: int, threshold: float | None, normalise: bool, balance: bool
) -> None:
    max_experts, grads = min(max_experts, values.shape[1]), []
    on_gpu = partial(gpu.route, normalise=normalise)
    on_cpu = partial(routing.route, weights="sum" if normalise else "softmax")
    for choose, device in ((on_cpu, torch.device("cpu")), (on_gpu, DEVICE)):
        leaf = values.clone().to(device).requires_grad_()
        found = choose(leaf, max_experts=max_experts, threshold=threshold)
        pairs = int(found.offsets[-1])
        objective = (found.weights[:pairs] * torch.linspace(-1, 2, pairs, device=device)).sum()
        if balance:
            objective = objective + found.balance_loss()
        objective.backward()
        assert leaf.grad is not None
        grads.append(leaf.grad.cpu())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def layer(activation: str = "swiglu", dtype: torch.dtype = torch.float32, tokens: int = 24) -> dict[str, Tensor]:
    """Leaves of a layer of experts of 16, 80 and 19 neurons at width 24 of a bank of width 32."""
    generator = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"x": (tokens, 24), "logits": (tokens, 3), "up_bias": (140,)}
    shapes |= dict.fromkeys(("up", "gate", "down") if ACTIVATIONS[activation].gated else ("up", "down"), (140, 32))
    return {
        name: torch.randn(*shape, generator=generator).to(DEVICE, dtype if name != "logits" else None).requires_grad_()
        for name, shape in shapes.items()
    }


LAYOUT = ExpertLayout((100, 0, 81), (16, 80, 19))


def bank(leaves: dict[str, Tensor]) -> Bank:
    return Bank(leaves["up"], leaves.get("gate"), leaves["down"], leaves.get("up_bias"))


def run(leaves: dict[str, Tensor], activation: str = "swiglu", threshold: float | None = 0.6) -> Tensor:
    found = gpu.route(leaves["logits"], max_experts=2, threshold=threshold)
    return sparse_ffn(leaves["x"], bank(leaves), LAYOUT, found, activation, "triton")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_entries_past_the_kept_pairs_are_never_read(activation: str) -> None:
    leaves = layer(activation)
    found = gpu.route(leaves["logits"].detach(), max_experts=3, threshold=0.4)
    pairs = int(found.offsets[-1])
    assert 0 < pairs < len(found.tokens)
    assert found.slots is not None
    results = []
    for rubbish in (0, 10**6):
        found.tokens[pairs:], found.slots[pairs:] = rubbish, rubbish
        weights = found.weights.clone()
        weights[pairs:] = float("nan") if rubbish else 0.0
        weights.requires_grad_()
        out = sparse_ffn(leaves["x"], bank(leaves), LAYOUT, replace(found, weights=weights), activation, "triton")
        tensors = [tensor for name, tensor in leaves.items() if name != "logits"]
        results.append((out, *torch.autograd.grad(out.square().sum(), [weights, *tensors])))
    for first, second in zip(*results, strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)
    assert (results[0][1][pairs:] == 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_runs_are_bitwise_equal(activation: str) -> None:
    leaves = layer(activation)
    found = []
    for _ in range(2):
        out = run(leaves, activation)
        found.append((out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("up_bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 24])
def test_operators_trace_without_running(activation: str, up_bias: bool, tokens: int) -> None:
    """Schema, fake kernels and autograd registration, as torch checks them.

    Not its comparison of values: what lies past an expert's columns in a hidden buffer is whatever memory held.
    """
    leaves = layer(activation, tokens=tokens)
    routed = (leaves["logits"], 2, 0.6, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.moesaic.route.default, routed, test_utils=checks)
    probabilities, pair_tokens, offsets, weights, slots, token_offsets, _ = (
        value.detach() for value in torch.ops.moesaic.route(*routed)
    )
    assert probabilities.shape == leaves["logits"].shape
    arguments = (
        leaves["x"], leaves["up"], leaves["up_bias"] if up_bias else None, leaves.get("gate"), leaves["down"],
        weights.requires_grad_(), pair_tokens, offsets, slots, token_offsets,
        list(LAYOUT.starts), list(LAYOUT.sizes), activation, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.moesaic.sparse_ffn.default, arguments, test_utils=checks)


@pytest.mark.parametrize("activation", ["gelu", "geglu_tanh"])
@pytest.mark.parametrize("up_bias", [True, False])
def test_a_compiled_layer_is_one_graph_with_the_same_values(activation: str, up_bias: bool) -> None:
    leaves = layer(activation)
    if not up_bias:
        del leaves["up_bias"]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = []
    for function in (run, compiled):
        out = function(leaves, activation, None)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain, rtol=1e-5, atol=1e-6)


def test_nothing_is_kept_without_gradients() -> None:
    leaves = {name: tensor.detach() for name, tensor in layer("relu").items()}
    assert run(leaves, "relu").grad_fn is None
    with torch.inference_mode():
        assert torch.equal(run(layer("relu"), "relu"), run(leaves, "relu"))


def test_nan_in_a_token_stays_in_that_token() -> None:
    for activation in ACTIVATIONS:
        leaves = {name: tensor.detach() for name, tensor in layer(activation).items()}
        clean = run(leaves, activation)
        leaves["x"][5] = float("nan")
        out = run(leaves, activation)
        assert out[5].isnan().all()
        keep = torch.arange(len(out), device=DEVICE) != 5
        assert torch.equal(out[keep], clean[keep])


def test_triton_is_offered_only_on_gpus() -> None:
    assert not has_triton(torch.device("cpu"))
    assert has_triton(DEVICE) == (DEVICE.type == "cuda")


@pytest.mark.gpu
def test_a_step_does_not_synchronise_with_the_device() -> None:
    leaves = layer("swiglu", torch.bfloat16)
    run(leaves).float().square().sum().backward()  # compiles, tunes, copies the layout
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(leaves).float().square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_graph_replays_the_same_values() -> None:
    leaves = {name: tensor.detach() for name, tensor in layer("swiglu", torch.bfloat16).items()}
    expected = run(leaves)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(leaves)
    leaves["x"].neg_().neg_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31_are_reached() -> None:
    """Pairs x hidden size above 2^31 values: 1.1 million tokens at 2048 neurons."""
    tokens, width, size = 1_100_000, 64, 2048
    x = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
    up, down = (torch.randn(2 * size, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    wide, layout = Bank(up, None, down), ExpertLayout((0, size), (size, size))
    values = torch.randn(tokens, 2, device=DEVICE)
    found = gpu.route(values, max_experts=1)
    out = sparse_ffn(x, wide, layout, found, "relu", "triton")
    last = slice(tokens - 100, tokens)
    few = gpu.route(values[last], max_experts=1)
    again = sparse_ffn(x[last], wide, layout, few, "relu", "triton")
    torch.testing.assert_close(out[last], again, rtol=2e-2, atol=2e-2)
