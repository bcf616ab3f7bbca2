import itertools
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from torch.utils.flop_counter import FlopCounterMode

from moesaic import kernels
from moesaic.nas.config import DeviceConfig
from moesaic.nas.context import Context
from moesaic.nas.costs.analytic import active_parameters, flops, flops_breakdown, parameters
from moesaic.nas.costs.latency.probe import Pass
from moesaic.nas.costs.memory import cache_memory
from moesaic.nas.costs.price import Pricer
from moesaic.nas.costs.use import LayerUse, Occupancy, OccupancyRow, counted_use, measured_use, worst_use
from moesaic.nas.device import choose_device
from moesaic.nas.tasks.language import next_tokens
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import (
    Architecture,
    Attention,
    Backbone,
    FeedForward,
    Layer,
    Router,
    Slot,
    Stack,
    load_space,
    preset_source,
)
from moesaic.search_spaces.files import read_value, write_value
from moesaic.search_spaces.trained import TrainedSpec
from moesaic.supernet import LayerLoad, Transformer, evaluate, experts
from tests.search_spaces.pruned import pruned_space

VOCABULARY, LENGTH, BATCH = 97, 12, 3
CONTEXT = Context(VOCABULARY, LENGTH, BATCH)
CPU = choose_device(DeviceConfig(device="cpu", threads=1))
SPACES = {name: load_space(preset_source(name)) for name in ("tiny", "small", "xmoe", "medium")}
SPACES["pruned"] = pruned_space()
_DENSE = Stack(96, (Layer(Attention(4, 2), FeedForward((192,))),) * 3)
SPACES["split"] = TrainedSpec(router=["mass", "mlp"]).build(Architecture(_DENSE, Backbone(24)))


def architectures(name: str, count: int) -> list[Architecture]:
    rng = Random(name)
    space = SPACES[name]
    return [space.smallest, space.largest, *(space.sample_balanced(rng) for _ in range(count))]


def model_and_tokens(architecture: Architecture) -> tuple[Transformer, torch.Tensor]:
    torch.manual_seed(0)
    model = Transformer(architecture, VOCABULARY).eval()
    for name, weight in model.named_parameters():
        if name.endswith(".router"):
            torch.nn.init.normal_(weight)  # routers that send tokens to different experts
    return model, torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))


def measured_uses(model: Transformer, windows: torch.Tensor) -> list[LayerUse]:
    batch, loss = next_tokens(windows), "cross_entropy"
    if model.architecture.backbone.head == "none":
        batch, loss = replace(batch, teacher=torch.ones(*batch.tokens.shape, 1)), "cosine_distance"
    return Pricer(CONTEXT).measured_uses(model.architecture, evaluate(model, batch, loss=loss).loads)


@pytest.mark.parametrize("name", SPACES)
def test_parameters_are_those_of_the_module(name):
    for architecture in architectures(name, 2 if name == "medium" else 10):
        with torch.device("meta"):
            model = Transformer(architecture, VOCABULARY)
        assert parameters(architecture, CONTEXT) == sum(p.numel() for p in model.parameters())


BACKBONES = {
    "GPT-2": Backbone(16, "gelu_tanh", "layer", positions="learned", max_positions=40, biases="all"),
    "BERT": Backbone(24, "gelu", "layer", "post", embedding_norm=True, positions="learned", max_positions=40,
                     biases="all", tied=False),
    "BERT with its head": Backbone(24, "gelu", "layer", "post", embedding_norm=True, positions="learned",
                                   max_positions=40, biases="all", head="masked"),
    "a sentence encoder": Backbone(24, "gelu", "layer", "post", head="none"),
    "masked and pre-norm": Backbone(24, "relu", head="masked", tied=False),
    "Qwen2": Backbone(20, "swiglu", rotary_fraction=0.5, biases="qkv", tied=False),
    "Qwen3": Backbone(20, "swiglu", qk_norm="head", shared_gate=True),
    "OLMoE": Backbone(16, "swiglu", qk_norm="all"),
    "T5 v1.1": Backbone(16, "geglu_tanh", positions="none", tied=False),
}  # fmt: skip


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_parameters_and_flops_hold_on_every_backbone(backbone, unfused_attention):
    members = architectures("tiny", 8) + architectures("pruned", 8)
    for architecture in (replace(member, backbone=backbone) for member in members):
        model, windows = model_and_tokens(architecture)
        assert parameters(architecture, CONTEXT) == sum(p.numel() for p in model.parameters())
        uses = measured_uses(model, windows)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(windows[:, :-1])
        assert counter.get_total_flops() == pytest.approx(CONTEXT.tokens * flops(architecture, uses, CONTEXT), rel=1e-9)


@pytest.fixture
def unfused_attention(monkeypatch):
    """Attention as two products that a counter sees; the fused operator counts as nothing on a CPU."""

    def attention(q, k, v, is_causal=False, attn_mask=None):
        assert attn_mask is None
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if is_causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
        return scores.softmax(-1) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


@pytest.mark.parametrize("name", ["tiny", "small", "xmoe", "split"])
def test_flops_are_exactly_those_that_torch_counts(name, unfused_attention):
    for architecture in architectures(name, 8):
        model, windows = model_and_tokens(architecture)
        uses = measured_uses(model, windows)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(windows[:, :-1])
        assert counter.get_total_flops() == pytest.approx(CONTEXT.tokens * flops(architecture, uses, CONTEXT), rel=1e-9)


@pytest.mark.parametrize("name", ["tiny", "small", "xmoe", "split"])
def test_flops_are_exactly_those_that_fvcore_counts(name, unfused_attention, monkeypatch):
    # Tracing does not see into a custom autograd function, and does not know all that routing does.
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "torch", kernels.IMPLEMENTATIONS["reference"])
    for architecture in architectures(name, 3):
        model, windows = model_and_tokens(architecture)
        uses = measured_uses(model, windows)
        with torch.no_grad():
            routings = itertools.cycle([r for r in model.run(windows[:, :-1]).routings if r is not None])
        with monkeypatch.context() as patch:

            def route(logits, routings=routings, **_):
                known = next(routings)
                return replace(known, weights=known.weights + 0 * logits.sum())  # unused logits would not be traced

            patch.setattr(experts, "route", route)
            analysis = FlopCountAnalysis(model, windows[:, :-1]).unsupported_ops_warnings(False).tracer_warnings("none")
            counts = analysis.by_operator()
        counted = counts["linear"] + counts["matmul"]  # norms and index_add count too
        assert 2 * counted == pytest.approx(CONTEXT.tokens * flops(architecture, uses, CONTEXT), rel=1e-9)


@pytest.mark.parametrize("name", ["small", "split"])
def test_the_breakdown_sums_to_the_total(name):
    for architecture in architectures(name, 20):
        uses = Pricer(CONTEXT).expected_uses(architecture)
        layers, vocabulary = flops_breakdown(architecture, uses, CONTEXT)
        total = sum(sum(parts.values()) for parts in layers.values()) + vocabulary
        assert total == pytest.approx(flops(architecture, uses, CONTEXT), rel=1e-12)


def test_worst_case_is_never_below_the_expected_one_nor_that_below_the_smallest():
    pricer = Pricer(CONTEXT)
    for architecture in architectures("small", 200):
        expected, worst = pricer.expected(architecture), pricer.worst(architecture)
        for cost in expected:
            assert worst[cost] >= expected[cost] * (1 - 1e-12)
        assert expected["active_parameters"] <= expected["parameters"] * (1 + 1e-12)


def test_active_parameters_of_a_dense_model_are_all():
    rng = Random(0)
    dense = [
        a
        for a in (SPACES["tiny"].sample_balanced(rng) for _ in range(300))
        if all(layer.feed_forward.router is None for layer in a.layers.values())
    ]
    assert dense
    for architecture in dense:
        uses = Pricer(CONTEXT).expected_uses(architecture)
        assert active_parameters(architecture, uses, CONTEXT) == parameters(architecture, CONTEXT)


SLOT, EXTENT = Slot("decoder", 0), CONTEXT.extent("decoder")
THRESHOLD = Router("threshold", threshold=0.9, max_k=4)


def test_top_k_costs_k_experts_and_a_threshold_what_was_measured():
    part = FeedForward((64, 32, 32, 16), THRESHOLD, shared_size=16)
    uniform = Occupancy().expected(SLOT, part, EXTENT)
    assert uniform.pairs == 4  # ceil(0.9 * 4) of uniform probabilities
    known = Occupancy({(SLOT, 4, THRESHOLD): (0.5, 0.5, 0.25, 0.0)}).expected(SLOT, part, EXTENT)
    assert (known.pairs, known.neurons) == (1.25, 0.5 * 64 + 0.5 * 32 + 0.25 * 32)
    assert worst_use(part, EXTENT).neurons == 144
    assert worst_use(FeedForward((64, 32, 16), Router("top_k", k=2)), EXTENT).neurons == 96
    top = Occupancy({(SLOT, 4, THRESHOLD): (1.0, 0.25, 0.0, 0.0)}).expected(
        SLOT, FeedForward((64, 32), Router("top_k", k=1)), EXTENT
    )
    assert (top.pairs, top.neurons) == (1, 48)


def test_use_of_a_batch_counts_rows_and_whole_tiles():
    part = FeedForward((64, 32, 16), Router("top_k", k=2))
    use = counted_use(part, [36, 35, 1], EXTENT)
    assert (use.pairs, use.live_experts) == (2.0, 3)
    assert use.neurons * 36 == 36 * 64 + 35 * 32 + 16
    assert use.tiled_neurons * 36 == 48 * 64 + 48 * 32 + 16 * 16
    assert use.largest_neurons == 64
    assert counted_use(part, [36, 36, 0], EXTENT).live_experts == 2


@pytest.mark.parametrize("tokens", [4, 60, 2000])
@pytest.mark.parametrize("skew", [0.0, 1.0, 2.5])
def test_expected_use_is_the_mean_of_batches(tokens, skew):
    """Batches are drawn in which each token goes to its experts by chance; sizes are all alike, so order is nothing."""
    rng, experts = np.random.default_rng(0), 8
    shares = np.exp(-skew * np.arange(experts) / experts)
    shares /= shares.sum()
    router = Router("top_k", k=1)
    part, extent = FeedForward((32,) * experts, router), Context(VOCABULARY, tokens, 1).extent("decoder")
    batches = [counted_use(part, rng.multinomial(tokens, shares).tolist(), extent) for _ in range(400)]
    expected = Occupancy({(SLOT, experts, router): tuple(shares)}).expected(SLOT, part, extent)
    measured = measured_use(part, LayerLoad(tuple(shares)), extent)
    for name, tolerance in (("neurons", 1e-9), ("live_experts", 0.05), ("tiled_neurons", 0.08)):
        mean = np.mean([getattr(batch, name) for batch in batches])
        assert getattr(expected, name) == pytest.approx(mean, rel=tolerance)
        assert getattr(measured, name) == pytest.approx(mean, rel=tolerance)


def test_occupancy_survives_its_file(tmp_path):
    other = Slot("encoder", 1), 2, Router("top_k", k=1, weights="softmax")
    occupancy = Occupancy({(SLOT, 8, THRESHOLD): (1.0, 0.5), other: (0.75, 0.25)})
    write_value(tmp_path / "occupancy.json", occupancy.rows(), list[OccupancyRow])
    assert Occupancy.of(read_value(tmp_path / "occupancy.json", list[OccupancyRow])) == occupancy


def test_a_decoding_step_keeps_its_cache_and_computes_one_token_each():
    prefill, decode = Context(VOCABULARY, 64, 4), Context(VOCABULARY, 64, 4, phase="decode")
    assert (prefill.tokens, decode.tokens) == (256, 4)
    architecture = SPACES["small"].largest
    heads = sum(layer.attention.kv_heads for layer in architecture.layers.values())
    assert cache_memory(architecture, prefill) == 0
    assert cache_memory(architecture, decode) == 2 * 4 * heads * 32 * 4 * 65


@pytest.mark.parametrize("name", ["tiny", "small", "xmoe", "split"])
def test_flops_of_a_decoding_step_are_exactly_those_that_torch_counts(name, unfused_attention):
    """The new token attends to the cached positions and to itself."""
    context = replace(CONTEXT, phase="decode")
    for architecture in architectures(name, 8):
        model, windows = model_and_tokens(architecture)
        step = Pass(model, windows, context, CPU)
        with FlopCounterMode(display=False) as counter:
            step()
        assert counter.get_total_flops() == pytest.approx(BATCH * flops(architecture, step.uses(), context), rel=1e-9)


def test_every_cost_has_a_dimension():
    costs = Pricer(CONTEXT).expected(SPACES["tiny"].smallest)
    assert {*costs, "latency"} == set(DIMENSIONS)
