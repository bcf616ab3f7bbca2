"""Models that translate: slices, padding, decoding with a cache, and torch's own Transformer as a reference."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moesaic.search_spaces import (
    Architecture,
    Attention,
    Backbone,
    CrossAttention,
    FeedForward,
    Layer,
    MoesaicError,
    SearchSpace,
    Stack,
)
from moesaic.supernet import Batch, Judge, KeyValueCache, SliceSampler, Transformer, evaluate, scratch
from tests.search_spaces.two_stacks import hat_like_space, two_stack_space

V, SOURCE_V = 40, 30
SPACES: dict[str, SearchSpace] = {"hat": hat_like_space(), "two": two_stack_space()}
seeds = st.integers(0, 2**32)


def model_of(architecture: Architecture, source_vocab_size: int | None = None) -> Transformer:
    """With weights large enough that outputs say something."""
    model = scratch(V, 0, source_vocab_size=source_vocab_size)(architecture).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


SUPERNETS = {
    (name, vocabulary): model_of(space.envelope, vocabulary)
    for name, space in SPACES.items()
    for vocabulary in (None, SOURCE_V)
}


def pairs(seed: int, rows: int = 3, length: int = 7, source_length: int = 6) -> Batch:
    """Random pairs of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)

    def side(longest: int) -> tuple[Tensor, Tensor]:
        lengths = torch.randint(1, longest + 1, (rows, 1), generator=generator)
        return torch.randint(0, SOURCE_V, (rows, longest), generator=generator), torch.arange(longest) < lengths

    (tokens, mask), (source, source_mask) = side(length), side(source_length)
    return Batch(tokens, tokens.roll(-1, 1), mask, source=source, source_mask=source_mask)


def logits(model: Transformer, batch: Batch, architecture: Architecture | None = None) -> Tensor:
    return model(batch.tokens, architecture, batch.mask, batch.source, batch.source_mask)


cases = st.sampled_from(sorted(SUPERNETS, key=str))


@given(case=cases, seed=seeds)
@torch.no_grad()
def test_a_slice_and_its_extracted_model_give_the_same_logits(case: tuple[str, int | None], seed: int) -> None:
    space, supernet, batch = SPACES[case[0]], SUPERNETS[case], pairs(seed)
    architecture = space.sample_balanced(Random(seed))
    extracted = supernet.extract(architecture)
    whole, alone = logits(supernet, batch, architecture), logits(extracted, batch)
    assert torch.allclose(whole[batch.mask], alone[batch.mask], atol=1e-4)
    assert whole[batch.mask].std() > 0.1
    regions = supernet.where(architecture)
    for name, parameter in extracted.named_parameters():
        assert torch.equal(parameter, regions[name].of(supernet.get_parameter(name)))


@given(case=cases, seed=seeds)
def test_gradients_of_a_slice_are_those_of_the_extracted_model(case: tuple[str, int | None], seed: int) -> None:
    space, supernet, batch = SPACES[case[0]], SUPERNETS[case], pairs(seed)
    architecture = space.sample_balanced(Random(seed))
    extracted = supernet.extract(architecture)
    supernet.zero_grad()
    for model, used in ((supernet, architecture), (extracted, None)):
        output = model.run(batch.tokens, used, None, batch.mask, batch.source, batch.source_mask)
        (output.logits[batch.mask].square().mean() + output.balance_loss()).backward()
    for name, region in supernet.where(architecture).items():
        mine, theirs = supernet.get_parameter(name).grad, extracted.get_parameter(name).grad
        assert (mine is None) == (theirs is None), name
        if mine is not None and theirs is not None:
            assert torch.allclose(region.of(mine), theirs, atol=1e-4), name


@given(case=cases, seed=seeds)
@torch.no_grad()
def test_padding_of_either_side_changes_nothing(case: tuple[str, int | None], seed: int) -> None:
    model, batch = SUPERNETS[case], pairs(seed)
    architecture = SPACES[case[0]].sample_balanced(Random(seed))
    whole = logits(model, batch, architecture)
    for row in range(len(batch)):
        one = batch[row : row + 1].trimmed()
        alone = model(one.tokens, architecture, None, one.source, None)
        assert torch.allclose(alone[0], whole[row, : alone.shape[1]], atol=1e-4)


@given(case=cases, seed=seeds, step=st.integers(1, 3))
@torch.no_grad()
def test_decoding_with_a_cache_gives_the_logits_of_one_pass(case: tuple[str, int | None], seed: int, step: int) -> None:
    """Also where several rows in a row read one source, as beams do."""
    model, batch = SUPERNETS[case], pairs(seed, rows=4)
    architecture = SPACES[case[0]].sample_balanced(Random(seed))
    source, mask = batch.source[:2], batch.source_mask[:2]
    cache = KeyValueCache(architecture, 4, 7)
    found = [
        model.run(
            batch.tokens[:, at : at + step], architecture, cache, None, *((source, mask) if at == 0 else ())
        ).logits
        for at in range(0, 7, step)
    ]
    twice = (part.repeat_interleave(2, dim=0) for part in (source, mask))
    expected = model(batch.tokens, architecture, None, *twice)
    assert torch.allclose(torch.cat(found, dim=1), expected, atol=1e-4)


@given(seed=seeds)
@torch.no_grad()
def test_a_cache_goes_on_with_the_rows_and_sources_that_are_kept(seed: int) -> None:
    case = ("hat", None)
    model, batch = SUPERNETS[case], pairs(seed, rows=6)
    architecture = SPACES["hat"].sample_balanced(Random(seed))
    source, mask = batch.source[:3], batch.source_mask[:3]
    cache = KeyValueCache(architecture, 6, 7)
    model.run(batch.tokens[:, :4], architecture, cache, None, source, mask)
    rows, sources = torch.tensor([5, 5, 1, 0]), torch.tensor([2, 0])
    cache.keep(rows, sources)
    last = model.run(batch.tokens[rows, 4:], architecture, cache).logits
    read = [part[sources].repeat_interleave(2, dim=0) for part in (source, mask)]
    expected = model(batch.tokens[rows], architecture, None, *read)[:, 4:]
    assert torch.allclose(last, expected, atol=1e-4)


def test_without_a_source_there_is_one_message() -> None:
    with pytest.raises(MoesaicError, match="a model with an encoder translates"):
        SUPERNETS["two", None](torch.zeros(1, 3, dtype=torch.long))


# ---------------------------------------------------------------- a reference


def reference(architecture: Architecture, seed: int) -> tuple[nn.ModuleList, nn.ModuleList, Transformer]:
    """torch's layers, whose norms are after the blocks, and our model with their weights."""
    torch.manual_seed(seed)
    encoder, decoder = architecture.encoder, architecture.decoder
    assert encoder is not None
    layers = [
        nn.ModuleList(
            kind(stack.width, layer.attention.heads, layer.feed_forward.neurons, dropout=0.0, batch_first=True)
            for layer in stack.layers
        )
        for kind, stack in ((nn.TransformerEncoderLayer, encoder), (nn.TransformerDecoderLayer, decoder))
    ]
    model = model_of(architecture)
    for name, theirs in zip(("encoder", "decoder"), layers, strict=True):
        for mine, other in zip(model.stacks[name].layers, theirs, strict=True):
            for parameter in other.parameters():
                nn.init.normal_(parameter, std=0.2)
            norms = [other.norm1, other.norm2] + ([other.norm3] if name == "decoder" else [])
            blocks = ["attention", *(["cross"] if name == "decoder" else []), "feed_forward"]
            with torch.no_grad():
                for block, norm in zip(blocks, norms, strict=True):
                    getattr(mine, f"{block}_norm").weight.copy_(norm.weight)
                    getattr(mine, f"{block}_norm").bias.copy_(norm.bias)
                for block, module in (
                    ("attention", other.self_attn),
                    ("cross", getattr(other, "multihead_attn", None)),
                ):
                    if module is not None:
                        own = getattr(mine, block)
                        for letter, weight, bias in zip(
                            "qkv", module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True
                        ):
                            getattr(own, letter).copy_(weight)
                            getattr(own, f"{letter}_bias").copy_(bias)
                        own.o.copy_(module.out_proj.weight)
                        own.o_bias.copy_(module.out_proj.bias)
                mine.feed_forward.up.copy_(other.linear1.weight)
                mine.feed_forward.up_bias.copy_(other.linear1.bias)
                mine.feed_forward.down.copy_(other.linear2.weight.T)
                mine.feed_forward.down_bias.copy_(other.linear2.bias)
    return layers[0].eval(), layers[1].eval(), model


def dense(width: int, depths: tuple[int, int], span: int = 1) -> Architecture:
    layer = Layer(Attention(4, 4), FeedForward((48,)))
    reading = replace(layer, cross=CrossAttention(4, 4, span))
    backbone = Backbone(activation="relu", norm="layer", norm_place="post", norm_eps=1e-5, positions="sinusoidal",
                        biases="all", qkv_width=width)  # fmt: skip
    return Architecture(Stack(width, (reading,) * depths[1]), backbone, Stack(width, (layer,) * depths[0], False))


@pytest.mark.parametrize("span", [1, 2, 3])
@torch.no_grad()
def test_a_dense_network_is_torchs_own(span: int) -> None:
    """Positions by their formula; a span over several layers is one longer memory."""
    encoder, decoder, model = reference(dense(32, (3, 2), span), seed=span)
    batch = pairs(span)
    rate = torch.tensor([[10_000 ** (-(2 * (i // 2)) / 32) for i in range(32)]])
    angle = torch.arange(10)[:, None] * rate
    positions = torch.where(torch.arange(32) % 2 == 0, angle.sin(), angle.cos())
    table = model.stacks["decoder"].embedding.weight

    def read(tokens: Tensor) -> Tensor:
        return table[tokens] * 32**0.5 + positions[: tokens.shape[1]]

    x, states = read(batch.source), []
    for layer in encoder:
        x = layer(x, src_key_padding_mask=~batch.source_mask)
        states.append(x)
    memory, hidden = torch.cat(states[-span:], dim=1), ~batch.source_mask.repeat(1, span)
    y = read(batch.tokens)
    causal = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
    for layer in decoder:
        y = layer(y, memory, tgt_mask=causal, memory_key_padding_mask=hidden, tgt_is_causal=True)
    assert torch.allclose(logits(model, batch)[batch.mask], (y @ table.T)[batch.mask], atol=1e-4)


# ---------------------------------------------------------------- judging


@pytest.mark.parametrize("vocabulary", [None, SOURCE_V])
def test_loads_are_per_token_of_their_stack_and_a_judge_can_be_rebuilt(vocabulary: int | None) -> None:
    model, batch, space = SUPERNETS["hat", vocabulary], pairs(5, rows=9), SPACES["hat"]
    judge = Judge(model, batch)
    for architecture in (*SliceSampler(space, 0).slices(3), space.largest):
        found = judge(architecture)
        for layer, load in zip(architecture.layers.values(), found.loads, strict=True):
            router = layer.feed_forward.router
            assert (load is None) == (router is None)
            if load is not None and router is not None and router.kind == "top_k":
                assert sum(load.pairs_per_token) == pytest.approx(router.max_experts)
        facts, arrays = judge.plain()
        assert Judge.of(facts, arrays, torch.device("cpu"))(architecture) == found


def test_the_loss_is_that_of_each_pair_alone() -> None:
    model, batch = SUPERNETS["two", None], pairs(6, rows=5)
    found = evaluate(model, batch, rows=2)
    for row in range(5):
        one = evaluate(model, batch[row : row + 1].trimmed())
        assert one.loss == pytest.approx(found.sequence_losses[row], abs=1e-5)
    assert found.tokens == int(batch.mask.sum())
