"""The table of activations against explicit formulas, and the reference layer against torch's modules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moesaic.kernels import ACTIVATIONS, Bank, ExpertLayout, route, sparse_ffn
from moesaic.kernels.activations import Pointwise

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: (z + z.abs()) / 2,
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: z * torch.special.ndtr(z),
    "gelu_tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
}
"""By the name of the function; relu's gradient at 0 is not looked at."""

MODULES: dict[str, tuple[nn.Module, bool]] = {
    "relu": (nn.ReLU(), False),
    "gelu": (nn.GELU(), False),
    "gelu_tanh": (nn.GELU(approximate="tanh"), False),
    "swiglu": (nn.SiLU(), True),
    "geglu": (nn.GELU(), True),
    "geglu_tanh": (nn.GELU(approximate="tanh"), True),
}
"""What each activation means: torch's module, and whether it is applied to a gate."""

POINTWISE = {activation.pointwise.name: activation.pointwise for activation in ACTIVATIONS.values()}


@pytest.mark.parametrize("pointwise", POINTWISE.values(), ids=POINTWISE)
def test_functions_and_gradients_match_the_formulas(pointwise: Pointwise) -> None:
    z = torch.linspace(-6, 6, 1000, dtype=torch.float64).view(4, 250).requires_grad_()
    grad = torch.linspace(1, 2, 1000, dtype=torch.float64).view(4, 250)
    expected = FORMULAS[pointwise.name](z)
    (slope,) = torch.autograd.grad(expected, z, grad)
    argument = z.detach()
    torch.testing.assert_close(pointwise.forward(argument), expected)
    if pointwise.forward_in_place:
        copy = argument.clone()
        assert pointwise.forward_in_place(copy) is copy
        torch.testing.assert_close(copy, expected)
        torch.testing.assert_close(pointwise.backward(grad.clone(), copy), slope)
    overwritten = grad.clone()
    assert pointwise.backward(overwritten, argument) is overwritten
    torch.testing.assert_close(overwritten, slope)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_the_reference_is_a_layer_of_torch_modules(activation: str, bias: bool, dense: bool) -> None:
    """One expert of 7 neurons, or three that a router weighs, at width 5."""
    torch.manual_seed(0)
    function, gated = MODULES[activation]
    experts = 1 if dense else 3
    layers = [
        (nn.Linear(5, 7, bias).double(), nn.Linear(5, 7, False).double(), nn.Linear(7, 5, False).double())
        for _ in range(experts)
    ]
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    routing = None if dense else route(torch.randn(6, 3), max_experts=2)

    outputs = [down(function(gate(x)) * up(x) if gated else function(up(x))) for up, gate, down in layers]
    weights = torch.ones(6, 1, dtype=torch.float64)
    if routing is not None:
        expert = torch.repeat_interleave(torch.arange(3), routing.load)
        weights = torch.zeros(6, 3, dtype=torch.float64)
        weights[routing.tokens, expert] = routing.weights.double()
    expected = (torch.stack(outputs, dim=1) * weights[:, :, None]).sum(1)
    expected_grads = torch.autograd.grad(expected.square().sum(), [x, *(up.weight for up, _, _ in layers)])

    bank = Bank(
        torch.cat([up.weight for up, _, _ in layers]),
        torch.cat([gate.weight for _, gate, _ in layers]) if gated else None,
        torch.cat([down.weight.T for _, _, down in layers]),
        torch.cat([up.bias for up, _, _ in layers]) if bias else None,
    )
    layout = ExpertLayout(tuple(range(0, 7 * experts, 7)), (7,) * experts)
    out = sparse_ffn(x, bank, layout, routing, activation, "reference")
    grads = torch.autograd.grad(out.square().sum(), [x, *(up.weight for up, _, _ in layers)])
    torch.testing.assert_close(out, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_every_activation_is_in_the_table_of_meanings() -> None:
    assert list(MODULES) == list(ACTIVATIONS)
    assert FORMULAS.keys() == POINTWISE.keys()
