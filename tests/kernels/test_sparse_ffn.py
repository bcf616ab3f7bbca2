from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels import ACTIVATIONS, IMPLEMENTATIONS, Bank, ExpertLayout, Routing, route, segments, sparse_ffn
from moesaic.kernels.inference import release
from tests.kernels.gpu_tools import DEVICE

FAST = [name for name in IMPLEMENTATIONS if name != "reference"]


@dataclass(frozen=True)
class Case:
    """One call of the layer, with everything that has a gradient in ``leaves``."""

    x: Tensor
    bank: Bank
    layout: ExpertLayout
    routing: Routing | None
    activation: str
    direction: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        bank = self.bank
        found = {"x": self.x, "up": bank.up, "gate": bank.gate, "down": bank.down, "up_bias": bank.up_bias}
        if self.routing is not None:
            found["weights"] = self.routing.weights
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> Case:
        bank = map_bank(self.bank, lambda tensor: tensor.to(dtype))
        routing = self.routing and replace(self.routing, weights=self.routing.weights.to(dtype))
        return replace(self, x=self.x.to(dtype), bank=bank, routing=routing, direction=self.direction.to(dtype))

    def on(self, device: torch.device) -> Case:
        bank = map_bank(self.bank, lambda tensor: tensor.to(device))
        routing = self.routing and Routing(
            *(t.to(device) for t in (self.routing.tokens, self.routing.offsets, self.routing.weights)),
            self.routing.probabilities.to(device),
        )
        return replace(self, x=self.x.to(device), bank=bank, routing=routing, direction=self.direction.to(device))

    def call(self, leaves: dict[str, Tensor], implementation: str) -> Tensor:
        """The layer's output for other ``leaves``."""
        bank = Bank(leaves["up"], leaves.get("gate"), leaves["down"], leaves.get("up_bias"))
        routing = self.routing and replace(self.routing, weights=leaves["weights"])
        return sparse_ffn(leaves["x"], bank, self.layout, routing, self.activation, implementation)

    def run(self, implementation: str) -> dict[str, Tensor]:
        """Output and all gradients, of fresh leaves that keep their strides."""
        if implementation == "triton" and self.x.device.type != DEVICE.type:
            return {name: value.cpu() for name, value in self.on(DEVICE).run(implementation).items()}
        fresh = {name: tensor.detach().requires_grad_() for name, tensor in self.leaves.items()}
        out = self.call(fresh, implementation)
        assert out.dtype == self.x.dtype
        assert out.shape == self.x.shape
        grads = torch.autograd.grad(out, list(fresh.values()), self.direction, allow_unused=True)
        zeros = (torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, fresh.values(), strict=True))
        return {"out": out.detach(), **{f"grad {name}": g for name, g in zip(fresh, zeros, strict=True)}}


def map_bank(bank: Bank, function: Callable[[Tensor], Tensor]) -> Bank:
    tensors = (bank.up, bank.gate, bank.down, bank.up_bias)
    return Bank(*(None if tensor is None else function(tensor) for tensor in tensors))


def make_routing(table: Tensor, weights: Tensor) -> Routing:
    """Pairs where ``table`` [T, E] is true, built without the router."""
    pairs = [(e, t) for e in range(table.shape[1]) for t in range(table.shape[0]) if table[t, e]]
    tokens = torch.tensor([t for _, t in pairs], dtype=torch.int64)
    load = torch.tensor([0] + [int(table[:, e].sum()) for e in range(table.shape[1])])
    return Routing(tokens, load.cumsum(0), weights[: len(pairs)], table.double())


def make_case(
    sizes: list[int], table: Tensor | None, tokens: int, width: int, activation: str, *,
    bias: bool = True, extra_width: int = 0, gap: int = 0, transposed: bool = False, seed: int = 0,
) -> Case:  # fmt: skip
    """A case in float64. ``gap`` rows of the bank lie unused before each expert, ``extra_width`` columns beside."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    starts, end = [], 0
    for size in sizes:
        starts.append(end + gap)
        end += gap + size
    order = torch.randperm(len(sizes), generator=generator).tolist()  # experts need not stand in order
    layout = ExpertLayout(tuple(starts[i] for i in order), tuple(sizes[i] for i in order))
    rows, columns = end + gap, width + extra_width
    up, down = normal(rows, columns), normal(rows, columns)
    gate = normal(rows, columns) if ACTIVATIONS[activation].gated else None
    bank = Bank(up, gate, down, normal(rows) if bias else None)
    x = normal(width, tokens).t() if transposed else normal(tokens, width)
    routing = None if table is None else make_routing(table, normal(tokens * len(sizes)).abs() + 0.1)
    return Case(x, bank, layout, routing, activation, normal(tokens, width))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.sampled_from([1, 3, 7, 16, 33, 100, 300]), min_size=1, max_size=5))
    tokens = draw(st.sampled_from([0, 1, 2, 5, 17]))
    table = None
    if len(sizes) > 1 or draw(st.booleans()):
        kind = draw(st.sampled_from(["random", "one", "none", "all"]))
        random = torch.tensor(
            draw(st.lists(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)),
                          min_size=tokens, max_size=tokens)), dtype=torch.bool).view(tokens, len(sizes))  # fmt: skip
        alone = torch.arange(len(sizes)) == draw(st.integers(0, len(sizes) - 1))
        table = {
            "random": random,
            "one": alone.repeat(tokens, 1),  # all tokens go to one expert, the others are empty
            "none": torch.zeros_like(random),
            "all": torch.ones_like(random),
        }[kind]
    return make_case(
        sizes, table, tokens, draw(st.sampled_from([1, 4, 9])), draw(st.sampled_from(list(ACTIVATIONS))),
        bias=draw(st.booleans()),
        extra_width=draw(st.sampled_from([0, 3])), gap=draw(st.sampled_from([0, 2])),
        transposed=draw(st.booleans()), seed=draw(st.integers(0, 10_000)),
    )  # fmt: skip


@given(case=cases(), small=st.booleans())
def test_paths_without_gradients_give_the_output_of_the_reference(case: Case, small: bool) -> None:
    if small and case.routing is not None:  # one token of small experts has a path of its own
        count = len(case.layout.sizes)
        table = torch.rand(1, count, generator=torch.Generator().manual_seed(len(case.x))) < 0.6
        case = make_case([1, 7, 16, 16, 32][:count], table, 1, case.x.shape[1], case.activation, gap=2, extra_width=3)
    expected = case.call(case.leaves, "reference")
    with torch.no_grad():
        found = case.call(case.leaves, "torch")
    torch.testing.assert_close(found, expected)
    single = case.to(torch.bfloat16)
    with torch.no_grad():
        assert single.call(single.leaves, "torch").dtype == torch.bfloat16


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative Frobenius error of the output and of each gradient."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm()
        assert error <= tolerance * value.double().norm(), f"{name}: {error} of {value.norm()}"


@pytest.mark.parametrize("implementation", FAST)
@settings(max_examples=25)
@given(case=cases())
def test_output_and_gradients_match_the_reference_in_float64(implementation: str, case: Case) -> None:
    assert_near(case.run(implementation), case.run("reference"), 1e-10)


@pytest.mark.parametrize("implementation", FAST)
@settings(max_examples=25)
@given(case=cases())
def test_output_and_gradients_match_the_reference_in_float32(implementation: str, case: Case) -> None:
    single = case.to(torch.float32)
    assert_near(single.run(implementation), single.to(torch.float64).run("reference"), 1e-5)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bank_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_error_is_that_of_its_precision(implementation: str, activation: str, bank_dtype: torch.dtype) -> None:
    table = torch.rand(32, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    case = make_case([16, 64, 128, 48], table, 32, 32, activation, extra_width=16, seed=2).to(torch.bfloat16)
    exact = case.to(torch.float64).run("reference")
    mixed = replace(case, bank=case.to(bank_dtype).bank)  # master weights may stay in float32
    found = mixed.run(implementation)
    assert found["out"].dtype == torch.bfloat16
    assert found["grad up"].dtype == found["grad up_bias"].dtype == bank_dtype
    assert_near(found, exact, 1e-2)
    error, size = (found["out"].double() - exact["out"]).abs(), exact["out"].abs()
    relative = error / size.clamp(min=size.square().mean().sqrt())
    # Between the steps of the CPU path values are rounded; the Triton kernels round only what they store.
    assert relative.max() <= (3e-2 if implementation == "torch" else 2e-2)
    assert relative.square().mean().sqrt() <= 4e-3


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("scale", [1e-18, 1e4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_huge_and_tiny_inputs_match_the_reference(implementation: str, scale: float, activation: str) -> None:
    table = torch.rand(9, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    case = make_case([5, 500, 17], table, 9, 8, activation, seed=3)
    case = replace(case, x=case.x * scale)
    assert_near(case.run(implementation), case.run("reference"), 1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "relu"])
@pytest.mark.parametrize("dense", [True, False])
def test_gradcheck(implementation: str, activation: str, dense: bool) -> None:
    table = None if dense else torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
    case = make_case([3] if dense else [2, 3, 1], table, 3, 2, activation, extra_width=1, gap=1, seed=4)
    names = list(case.leaves)

    def run(*leaves: Tensor) -> Tensor:
        return case.call(dict(zip(names, leaves, strict=True)), implementation)

    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves.values()]
    # In the interpreter a call takes long; one random direction in place of every element needs few of them.
    assert torch.autograd.gradcheck(run, leaves, fast_mode=implementation == "triton")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_layer_by_hand(implementation: str) -> None:
    """Two experts of one neuron, three tokens; the numbers are worked out on paper."""
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [-1.0, 0.0]])
    bank = Bank(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), None, torch.tensor([[10.0, 1.0], [2.0, 20.0]]))
    table = torch.tensor([[True, True], [True, False], [False, False]])
    routing = make_routing(table, torch.tensor([0.5, 2.0, 0.25]))  # (expert 0: tokens 0, 1), (expert 1: token 0)
    out = sparse_ffn(x, bank, ExpertLayout((0, 1), (1, 1)), routing, "relu", implementation)
    # token 0: 0.5 * relu(1) * [10, 1] + 0.25 * relu(2) * [2, 20]; token 1: 2 * relu(3) * [10, 1]; token 2: none
    assert out.tolist() == [[6.0, 10.5], [60.0, 6.0], [0.0, 0.0]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_and_columns_outside_the_layout_are_neither_read_nor_trained(implementation: str, activation: str) -> None:
    table = torch.ones(4, 2, dtype=torch.bool)
    table[:, 1] = False  # the second expert is there, but no token goes to it
    case = make_case([4, 3], table, 4, 5, activation, extra_width=2, gap=3, seed=5)
    start, size = case.layout.segments[0]
    found = case.run(implementation)
    for name in ("up", "gate", "down", "up_bias"):
        tensor = getattr(case.bank, name)
        if tensor is not None:
            used = torch.zeros(tensor.shape, dtype=torch.bool)
            used[(slice(start, start + size), slice(5))[: tensor.dim()]] = True
            assert torch.equal(found[f"grad {name}"] != 0, used) or activation == "relu"
            assert (found[f"grad {name}"][~used] == 0).all()
            tensor[~used] = float("nan")
    assert torch.equal(case.run(implementation)["out"], found["out"])


@pytest.mark.parametrize("implementation", FAST)
def test_a_real_routing_trains_the_router_as_the_reference_does(implementation: str) -> None:
    case = make_case([16, 40, 8], None, 20, 8, "swiglu", seed=6).to(torch.float32)
    scores = torch.randn(20, 3, generator=torch.Generator().manual_seed(7))
    grads = []
    for name in ("reference", implementation):
        logits = scores.clone().requires_grad_()
        routing = route(logits, max_experts=3, threshold=0.6)
        sparse_ffn(case.x, case.bank, case.layout, routing, "swiglu", name).square().sum().backward()
        grads.append(logits.grad)
    assert grads[0] is not None
    assert grads[0].norm() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4 * grads[0].abs().max().item())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_arguments_are_not_changed(implementation: str) -> None:
    table = torch.ones(4, 2, dtype=torch.bool)
    case = make_case([4, 3], table, 4, 5, "swiglu", seed=8)
    before = {name: tensor.clone() for name, tensor in case.leaves.items()}
    case.run(implementation)
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.leaves.items())


def test_without_gradients_the_output_is_the_same() -> None:
    table = torch.ones(4, 2, dtype=torch.bool)
    case = make_case([4, 3], table, 4, 5, "gelu", seed=9)
    with torch.no_grad():
        out = sparse_ffn(case.x, case.bank, case.layout, case.routing, "gelu")
    assert torch.equal(out, case.run("torch")["out"])


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    case = make_case([4], None, 3, 5, "gelu", seed=10)
    x = case.x.requires_grad_()
    out = sparse_ffn(x, case.bank, case.layout, None, "gelu")
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_a_gate_is_required_exactly_for_gated_units() -> None:
    gated, plain = (make_case([4], None, 3, 5, activation) for activation in ("swiglu", "relu"))
    with pytest.raises(ValueError, match="geglu needs a gate"):
        sparse_ffn(plain.x, plain.bank, plain.layout, None, "geglu")
    with pytest.raises(ValueError, match="relu has no gate"):
        sparse_ffn(gated.x, gated.bank, gated.layout, None, "relu")


def test_an_unknown_activation_is_refused_with_the_known_ones() -> None:
    case = make_case([4], None, 3, 5, "relu")
    with pytest.raises(ValueError, match="unknown activation silu: use one of relu, gelu, gelu_tanh, swiglu, geglu"):
        sparse_ffn(case.x, case.bank, case.layout, None, "silu")


@pytest.mark.parametrize("shape", [(4, 1), (3,)])
def test_a_bias_is_one_value_per_neuron(shape: tuple[int, ...]) -> None:
    case = make_case([4], None, 3, 5, "relu")
    bank = replace(case.bank, up_bias=torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="there are 4 neurons"):
        sparse_ffn(case.x, bank, case.layout, None, "relu")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bias_alone_may_be_trained(implementation: str) -> None:
    case = make_case([4, 3], torch.ones(6, 2, dtype=torch.bool), 6, 5, "geglu_tanh", seed=16)
    bias = case.leaves["up_bias"].clone().requires_grad_()
    out = case.call({**case.leaves, "up_bias": bias}, implementation)
    (grad,) = torch.autograd.grad(out, bias, case.direction)
    assert_near({"grad": grad}, {"grad": case.run("reference")["grad up_bias"]}, 1e-10)


@pytest.mark.parametrize("implementation", FAST)
def test_an_expert_may_have_many_pairs(implementation: str) -> None:
    """More than any kernel takes at once, and more neurons."""
    case = make_case([150, 20], torch.ones(200, 2, dtype=torch.bool), 200, 6, "geglu", gap=1, seed=14)
    assert_near(case.run(implementation), case.run("reference"), 1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tensors_may_have_any_stride(implementation: str) -> None:
    case = make_case([4, 20, 3], torch.ones(9, 3, dtype=torch.bool), 9, 5, "gelu", seed=15)
    assert case.routing is not None

    def spread(vector: Tensor) -> Tensor:
        return torch.stack((vector, torch.zeros_like(vector)), dim=1)[:, 0]

    lists = {name: spread(getattr(case.routing, name)) for name in ("tokens", "offsets", "weights")}
    assert case.bank.up_bias is not None
    bank = replace(case.bank, up_bias=spread(case.bank.up_bias), down=case.bank.down.T.contiguous().T)
    other = replace(case, bank=bank, routing=replace(case.routing, **lists))
    assert_near(other.run(implementation), case.run(implementation), 1e-12)


def test_several_experts_need_a_routing_and_a_layout_needs_starts_and_sizes() -> None:
    case = make_case([4, 4], torch.ones(3, 2, dtype=torch.bool), 3, 5, "relu")
    with pytest.raises(ValueError, match="one expert"):
        sparse_ffn(case.x, case.bank, case.layout, None, "relu")
    with pytest.raises(ValueError, match="2 starts but 1 sizes"):
        ExpertLayout((0, 4), (4,))


@pytest.mark.parametrize("block_elements", [1, 40])
@given(case=cases())
def test_pairs_may_be_taken_in_blocks_of_any_size(block_elements: int, case: Case) -> None:
    """Cases are small: they would all fit into one block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "BLOCK_ELEMENTS", block_elements)
        found = case.run("torch")
    assert_near(found, case.run("reference"), 1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_runs_and_two_backward_passes_are_equal_bit_for_bit(activation: str) -> None:
    table = torch.rand(200, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    case = make_case([16, 48, 33, 7, 64, 1], table, 200, 24, activation, seed=11).to(torch.float32)
    first, second = case.run("torch"), case.run("torch")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    x = case.x.detach().requires_grad_()
    out = sparse_ffn(x, case.bank, case.layout, case.routing, activation, "torch")
    for _ in range(2):  # what is kept for the backward pass survives it
        (grad,) = torch.autograd.grad(out, x, case.direction, retain_graph=True)
        assert torch.equal(grad, first["grad x"])


def test_nothing_is_kept_without_gradients() -> None:
    case = make_case([4, 3], torch.ones(4, 2, dtype=torch.bool), 4, 5, "swiglu", seed=12)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        case.run("torch")
        assert len(kept) > len(case.leaves)  # the leaves, the tokens and the hidden layer
        kept.clear()
        with torch.inference_mode():
            sparse_ffn(case.x, case.bank, case.layout, case.routing, "swiglu", "torch")
    assert not kept


def test_one_token_is_computed_inside_and_then_outside_of_inference_mode() -> None:
    case = make_case([4, 3], torch.ones(1, 2, dtype=torch.bool), 1, 5, "swiglu", seed=12)
    release()
    with torch.inference_mode():
        first = sparse_ffn(case.x, case.bank, case.layout, case.routing, "swiglu", "torch").clone()
    with torch.no_grad():
        assert torch.equal(sparse_ffn(case.x, case.bank, case.layout, case.routing, "swiglu", "torch"), first)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_mixes_bfloat16_inputs_with_a_float32_bank(activation: str) -> None:
    table = torch.rand(32, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    case = make_case([16, 64, 8], table, 32, 16, activation, seed=13).to(torch.float32)
    mixed = replace(case, x=case.x.bfloat16(), direction=case.direction.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixed.run("torch")
    assert found["grad up"].dtype == torch.float32
    exact = replace(case.to(torch.float64), x=mixed.x.double(), direction=mixed.direction.double())
    assert_near(found, exact.run("reference"), 3e-2)


def test_float16_is_refused_on_a_cpu() -> None:
    case = make_case([4], None, 3, 5, "relu").to(torch.float16)
    with pytest.raises(ValueError, match="use float32 or bfloat16"):
        sparse_ffn(case.x, case.bank, case.layout, None, "relu")
