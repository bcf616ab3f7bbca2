"""Costs of models that translate: closed forms against what torch counts, allocates and computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moesaic.nas.config import DeviceConfig
from moesaic.nas.context import Context, Phase
from moesaic.nas.costs.analytic import flops, flops_breakdown, parameters
from moesaic.nas.costs.count import count_flops
from moesaic.nas.costs.latency.predictor import TERMS, model_terms
from moesaic.nas.costs.latency.probe import Pass, random_passes, text_pass
from moesaic.nas.costs.latency.selection import shallow
from moesaic.nas.costs.measure import peak_activation_bytes
from moesaic.nas.costs.memory import activation_memory
from moesaic.nas.costs.price import Pricer
from moesaic.nas.costs.use import worst_use
from moesaic.nas.device import choose_device
from moesaic.search_spaces import Architecture, load_space, preset_source
from moesaic.supernet import Batch, Transformer
from tests.search_spaces.two_stacks import hat_like_space, two_stack_space

CPU = choose_device(DeviceConfig(device="cpu", threads=1))
SPACES = {
    "hat": hat_like_space(),
    "two": two_stack_space(),
    "translation": load_space(preset_source("translation")),
}
PHASES: tuple[Phase, ...] = ("prefill", "translate")


def context_of(phase: Phase, own_vocabulary: bool = False, bytes_per_value: int = 4) -> Context:
    return Context(
        61, 5, 2, bytes_per_value, phase,
        source_length=7, beam=3 if phase == "translate" else 1, source_vocab_size=43 if own_vocabulary else None,
    )  # fmt: skip


def drawn(name: str, count: int) -> Iterator[Architecture]:
    rng, space = Random(name), SPACES[name]
    yield from (space.smallest, space.largest)
    yield from (space.sample_balanced(rng) for _ in range(count))


@pytest.mark.parametrize("own_vocabulary", [False, True])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", SPACES)
def test_flops_are_exactly_those_that_torch_counts(name: str, phase: Phase, own_vocabulary: bool) -> None:
    """A translation encodes once; each of its steps computes every hypothesis; cross-attention reads each source's keys
    and values once."""
    context = context_of(phase, own_vocabulary)
    for architecture in drawn(name, 1):
        (one,) = random_passes([architecture], context, CPU, seed=1)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            one()
        priced = context.tokens * flops(architecture, one.uses(), context)
        assert counter.get_total_flops() == pytest.approx(priced, rel=1e-9)
        layers, head = flops_breakdown(architecture, one.uses(), context)
        assert context.tokens * (head + sum(sum(parts.values()) for parts in layers.values())) == pytest.approx(priced)


@pytest.mark.parametrize("own_vocabulary", [False, True])
@pytest.mark.parametrize("name", SPACES)
def test_parameters_are_counted(name: str, own_vocabulary: bool) -> None:
    context = context_of("prefill", own_vocabulary)
    for architecture in drawn(name, 10):
        model = Transformer(architecture, 61, source_vocab_size=context.source_vocab_size)
        assert parameters(architecture, context) == sum(parameter.numel() for parameter in model.parameters())


@given(
    name=st.sampled_from(list(SPACES)),
    phase=st.sampled_from(PHASES),
    bytes_per_value=st.sampled_from([4, 2]),
    seed=st.integers(0, 10**6),
    batch=st.sampled_from([1, 3]),
    lengths=st.tuples(st.sampled_from([2, 8]), st.sampled_from([1, 12])),
    vocabulary=st.sampled_from([61, 2000]),
)
@settings(max_examples=25)
def test_what_is_measured_is_within_the_worst_case_and_near_the_price(
    name: str, phase: Phase, bytes_per_value: int, seed: int, batch: int, lengths: tuple[int, int], vocabulary: int
) -> None:
    architecture = SPACES[name].sample_balanced(Random(seed))
    length, source_length = lengths
    beam = 4 if phase == "translate" else 1
    context = Context(vocabulary, length, batch, bytes_per_value, phase, source_length=source_length, beam=beam)
    (one,) = random_passes(
        [architecture], context, replace(CPU, dtype="float32" if bytes_per_value == 4 else "bfloat16"), seed
    )
    worst = [worst_use(layer.feed_forward, context.extent(at.stack)) for at, layer in architecture.layers.items()]
    measured = peak_activation_bytes(one)
    assert measured <= activation_memory(architecture, worst, context)
    assert activation_memory(architecture, one.uses(), context) / measured <= 4


def test_a_step_of_a_translation_is_a_step_of_its_model() -> None:
    """The tokens written are those of the context, whatever the weights say of the end."""
    context = context_of("translate")
    (one,) = random_passes([SPACES["hat"].largest], context, CPU, seed=0)
    steps: list[int] = []
    one.model.stacks["decoder"].layers[0].register_forward_hook(lambda _, inputs, __: steps.append(len(inputs[0])))
    one()
    assert steps == [2 * 3] * 5


def test_text_of_pairs_fills_a_context_without_padding() -> None:
    tokens = torch.arange(24).view(4, 6)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    batch = Batch(tokens, tokens, mask, source=tokens + 100, source_mask=mask)
    one = text_pass(Transformer(SPACES["two"].smallest, 130), batch, context_of("translate"), CPU)
    kept = tokens[mask].tolist()
    assert one.source is not None
    assert one.source.flatten().tolist() == [100 + token for token in (kept * 2)[:14]]
    assert one.tokens[0].tolist() == kept[:5]


@pytest.mark.parametrize("phase", PHASES)
def test_terms_of_products_are_the_flops(phase: Phase) -> None:
    context, pricer = context_of(phase), Pricer(context_of(phase))
    for architecture in drawn("hat", 20):
        if any(layer.feed_forward.router for layer in architecture.layers.values()):
            continue
        terms = dict(zip(TERMS, model_terms(architecture, pricer.expected_uses(architecture), context), strict=True))
        products = terms["vocabulary_products"] + terms["projection_products"] + terms["dense_products"]
        products += 2 * terms["score_products"]
        assert 2 * products == pytest.approx(context.tokens * pricer.expected(architecture)["flops"])


def test_shallow_models_have_the_encoder_layers_that_are_read() -> None:
    rng = Random(0)
    members = [SPACES["hat"].sample_balanced(rng) for _ in range(50)]
    found = shallow(members, 2, rng)
    assert {len(one.decoder.layers) for one in found} == {1, 2}
    for one, member in zip(found, members, strict=True):
        spans = [layer.cross.span for layer in one.decoder.layers if layer.cross]
        assert one.encoder is not None and member.encoder is not None
        assert max(spans) <= len(one.encoder.layers) <= max(2, *spans)
        assert set(one.decoder.layers) <= set(member.decoder.layers)


@pytest.mark.parametrize("name", ["hat", "two"])
def test_counters_agree_on_a_scored_translation(name: str) -> None:
    model = Transformer(SPACES[name].largest, 61)
    closed, torch_count, fvcore = count_flops(model, context_of("prefill"))
    assert closed.flops == pytest.approx(torch_count.flops)
    assert closed.flops == pytest.approx(fvcore.flops, rel=0.02)


def test_a_pass_is_named() -> None:
    assert str(context_of("translate")) == "2 x 7 source tokens, each translated into 5 tokens with beam 3"
    assert str(context_of("prefill")) == "2 x 7 source and 5 tokens"


def test_a_pass_of_pairs_keeps_its_inputs_apart_from_what_it_allocates() -> None:
    one = Pass(
        Transformer(SPACES["two"].smallest, 61), torch.zeros(1, 6, dtype=torch.long), context_of("prefill"), CPU,
        source=torch.zeros(1, 7, dtype=torch.long),
    )  # fmt: skip
    assert {id(one.tokens), id(one.source)} <= {id(tensor) for tensor in one.kept}
