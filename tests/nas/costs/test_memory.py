"""Memory in closed form against what is alive in a pass, in both types and on every backbone."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.kernels import segments, workspace
from moesaic.nas.config import DeviceConfig
from moesaic.nas.context import Context
from moesaic.nas.costs.latency.probe import Pass, random_passes
from moesaic.nas.costs.measure import peak_activation_bytes
from moesaic.nas.costs.memory import activation_memory
from moesaic.nas.costs.use import LayerUse, worst_use
from moesaic.nas.device import choose_device
from moesaic.search_spaces import (
    Architecture,
    Attention,
    Backbone,
    FeedForward,
    Layer,
    Router,
    Stack,
    load_space,
    preset_source,
)
from moesaic.search_spaces.trained import TrainedSpec
from tests.search_spaces.pruned import pruned_space

CPU = choose_device(DeviceConfig(device="cpu", threads=1))
BYTES = {"float32": 4, "bfloat16": 2}
SPACES = {name: load_space(preset_source(name)) for name in ("tiny", "small", "xmoe")} | {"pruned": pruned_space()}
_DENSE = Stack(96, (Layer(Attention(4, 2), FeedForward((192,))),) * 2)
SPACES["split"] = TrainedSpec(router=["mass", "mlp"]).build(Architecture(_DENSE, Backbone(24)))
BACKBONES = {
    "Llama": Backbone(32),
    "GPT-2": Backbone(16, "gelu_tanh", "layer", positions="learned", max_positions=65, biases="all"),
    "BERT": Backbone(24, "gelu", "layer", "post", embedding_norm=True, positions="learned", max_positions=65,
                     biases="all", tied=False),
    "BERT with its head": Backbone(24, "gelu", "layer", "post", embedding_norm=True, positions="learned",
                                   max_positions=65, biases="all", head="masked"),
    "a sentence encoder": Backbone(24, "gelu", "layer", "post", head="none"),
    "Qwen2": Backbone(20, "swiglu", rotary_fraction=0.5, biases="qkv", tied=False),
    "Qwen3": Backbone(20, "swiglu", qk_norm="head", shared_gate=True),
    "OLMoE": Backbone(16, "swiglu", qk_norm="all"),
    "T5 v1.1": Backbone(16, "geglu_tanh", positions="none", tied=False),
}  # fmt: skip


def worst_uses(architecture: Architecture, context: Context) -> list[LayerUse]:
    return [worst_use(layer.feed_forward, context.extent(at.stack)) for at, layer in architecture.layers.items()]


def worst_memory(architecture: Architecture, context: Context) -> float:
    return activation_memory(architecture, worst_uses(architecture, context), context)


def one_expert_for_all(one: Pass) -> None:
    """Every token prefers the first experts, in the same order."""
    for name, weight in one.model.named_parameters():
        if name.endswith(".router"):
            torch.nn.init.zeros_(weight)


@given(
    space=st.sampled_from(list(SPACES)),
    backbone=st.sampled_from(list(BACKBONES)),
    dtype=st.sampled_from(list(BYTES)),
    phase=st.sampled_from(["prefill", "decode"]),
    seed=st.integers(0, 10**6),
    batch=st.sampled_from([1, 3, 12]),
    length=st.sampled_from([1, 7, 64]),
    vocabulary=st.sampled_from([61, 3000]),
    unbalanced=st.booleans(),
)
@settings(max_examples=60)
def test_what_is_measured_is_within_the_worst_case_and_near_the_price(
    space, backbone, dtype, phase, seed, batch, length, vocabulary, unbalanced
):
    architecture = replace(SPACES[space].sample_balanced(Random(seed)), backbone=BACKBONES[backbone])
    context = Context(vocabulary, length, batch, BYTES[dtype], phase)
    (one,) = random_passes([architecture], context, replace(CPU, dtype=dtype), seed)
    if unbalanced:
        one_expert_for_all(one)
    measured = peak_activation_bytes(one)
    assert measured <= worst_memory(architecture, context)
    # Where few tokens choose experts, the copies of the largest experts' weights are priced, whichever are chosen.
    upper = 1.25 if context.tokens > 96 else 6
    assert 1 <= activation_memory(architecture, one.uses(), context) / measured <= upper


def test_memory_does_not_depend_on_what_was_measured_before():
    """A decoding step keeps a buffer as large as the largest model of the process needed."""
    context = Context(61, 1, 1, 4, "prefill")
    few, many = (FeedForward((16,) * n, Router("top_k", k=n // 2)) for n in (4, 32))
    architectures = [
        replace(SPACES["tiny"].smallest, decoder=Stack(32, (Layer(Attention(1, 1), part),))) for part in (few, many)
    ]
    small, large = random_passes(architectures, context, CPU, 0)
    alone = peak_activation_bytes(small)
    assert peak_activation_bytes(large) > alone
    assert peak_activation_bytes(small) == alone


@pytest.mark.parametrize("dtype", list(BYTES))
def test_a_block_of_one_expert_is_as_long_as_its_pairs(dtype, monkeypatch):
    # With the default block, only batches too large for a test have an expert that exceeds it.
    for module in (segments, workspace):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 2**10)
    architecture, context = SPACES["small"].largest, Context(61, 64, 4, BYTES[dtype])
    (one,) = random_passes([architecture], context, replace(CPU, dtype=dtype), 0)
    one_expert_for_all(one)
    assert 1 <= activation_memory(architecture, one.uses(), context) / peak_activation_bytes(one) <= 1.1


def test_half_the_bytes_per_value_do_not_halve_the_memory():
    """The residual stream and its norms keep 4 bytes, and the vocabulary layer's weights are copied."""
    architecture = SPACES["small"].largest
    full, half = (worst_memory(architecture, Context(3000, 64, 4, size)) for size in (4, 2))
    assert 0.55 * full < half < full
    full, half = (worst_memory(architecture, Context(3000, 64, 1, size, "decode")) for size in (4, 2))
    assert half > 2 * full


def test_a_triton_pass_is_priced_with_room_for_every_pair():
    architecture = SPACES["xmoe"].largest
    on_cpu, on_gpu = Context(61, 64, 4), Context(61, 64, 4, implementation="triton")
    uses = worst_uses(architecture, on_gpu)
    few, many = (
        activation_memory(architecture, [replace(use, pairs=pairs) for use in uses], on_gpu) for pairs in (1, 2)
    )
    assert few == many  # only the device knows how many pairs there are
    assert worst_memory(architecture, on_gpu) != worst_memory(architecture, on_cpu)
