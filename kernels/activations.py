"""The activations of a feed-forward layer: one table that every implementation uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


@dataclass(frozen=True)
class Pointwise:
    """A function of one value, applied to each element of a tensor of any shape.

    ``name`` selects the version in the Triton kernels. ``forward(z)`` returns a new tensor.
    ``backward(grad, z)`` overwrites ``grad`` with grad * forward'(z) and returns it. ``forward_in_place(z)`` exists
    only if ``backward`` also accepts forward(z) instead of z; then z need not be kept.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    forward_in_place: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Activation:
    """Hidden values from pre-activations: ``pointwise(up)``, or ``pointwise(gate) * up`` if ``gated``."""

    pointwise: Pointwise
    gated: bool = False

    @property
    def keeps_hidden(self) -> bool:
        """Whether the backward pass needs only the hidden values, not the pre-activations."""
        return self.pointwise.forward_in_place is not None and not self.gated


def _relu_backward(grad: Tensor, z: Tensor) -> Tensor:
    return _aten.threshold_backward.grad_input(grad, z, 0, grad_input=grad)


def _silu_backward(grad: Tensor, z: Tensor) -> Tensor:
    return _aten.silu_backward.grad_input(grad, z, grad_input=grad)


def _gelu_backward(grad: Tensor, z: Tensor, approximate: str) -> Tensor:
    return _aten.gelu_backward.grad_input(grad, z, approximate=approximate, grad_input=grad)


def _gelu(name: str, approximate: str) -> Pointwise:
    return Pointwise(name, partial(F.gelu, approximate=approximate), partial(_gelu_backward, approximate=approximate))


_RELU = Pointwise("relu", F.relu, _relu_backward, torch.relu_)
_SILU = Pointwise("silu", F.silu, _silu_backward)
_GELU = _gelu("gelu", "none")
_GELU_TANH = _gelu("gelu_tanh", "tanh")

ACTIVATIONS = {
    "relu": Activation(_RELU),
    "gelu": Activation(_GELU),
    "gelu_tanh": Activation(_GELU_TANH),
    "swiglu": Activation(_SILU, gated=True),
    "geglu": Activation(_GELU, gated=True),
    "geglu_tanh": Activation(_GELU_TANH, gated=True),
}
"""By name. ``gelu`` is exact (erf); ``gelu_tanh`` is its tanh approximation (arXiv 1606.08415, section 2), GPT-2's
``gelu_new``. The gated units are those of arXiv 2002.05202; T5 v1.1 uses ``geglu_tanh``."""
