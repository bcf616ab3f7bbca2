"""Padding changes nothing: sequences of a padded batch compute, train and decode as each does alone."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, Router
from moesaic.supernet import Batch, KeyValueCache, TrainData, TrainSettings, Transformer, train
from moesaic.supernet.attention import _seen
from moesaic.supernet.batch import Inputs
from moesaic.supernet.losses import cross_entropy
from moesaic.supernet.metrics import read_metrics
from tests.supernet.network_tools import (
    DENSE,
    POSITIONS,
    SPACE,
    SPARSE,
    backbones,
    network,
    on,
    padded_batch,
    randomised,
    tokens_of,
)

SIDES = {
    "right": lambda length, width: (0, length),
    "left": lambda length, width: (width - length, width),
    "both": lambda length, width: ((width - length) // 2, (width - length) // 2 + length),
}
PADDED = {
    "rotary": Backbone(12),
    "learned": Backbone(12, "gelu", "layer", positions="learned", max_positions=12, biases="all"),
    "post": Backbone(12, "gelu", "layer", "post", embedding_norm=True, positions="learned", max_positions=12),
}


@st.composite
def spans(draw: st.DrawFn, width: int) -> tuple[int, int]:
    """Where a sequence stands among ``width`` places; it may have no token at all."""
    start = draw(st.integers(0, width))
    return start, draw(st.integers(start, width))


batches = st.integers(2, POSITIONS).flatmap(
    lambda width: st.tuples(st.lists(spans(width), min_size=1, max_size=4), st.just(width))
)


def alone(batch: Batch, row: int) -> Batch:
    """One of its sequences without padding."""
    assert batch.mask is not None
    own = batch.mask[row]
    return Batch(batch.tokens[row, own][None], batch.targets[row, own][None])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- logits and routing


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backbone", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_padding_changes_no_logit_and_is_not_routed(side: str, backbone: Backbone, causal: bool) -> None:
    model = randomised(Transformer(network(backbone, SPARSE, DENSE, causal=causal), 23))
    lengths, width = [9, 4, 1, 0], 9
    batch = padded_batch([SIDES[side](length, width) for length in lengths], width)
    output = model.run(batch.tokens, mask=batch.mask)
    assert output.logits.isfinite().all()
    routing = output.routings[0]
    assert routing is not None
    assert len(routing.probabilities) == sum(lengths)
    for row, length in enumerate(lengths):
        if length:
            close(output.logits[row, batch.mask[row]], model(alone(batch, row).tokens)[0])


@given(backbone=backbones(), seed=st.integers(0, 10**6), causal=st.booleans(), shape=batches)
@torch.no_grad()
def test_a_slice_computes_padded_sequences_as_each_alone(backbone, seed: int, causal: bool, shape) -> None:
    supernet = randomised(Transformer(on(backbone, SPACE.envelope, causal), 23))
    member = on(backbone, SPACE.sample_balanced(Random(seed)), causal)
    batch = padded_batch(*shape, seed)
    output = supernet.run(batch.tokens, member, mask=batch.mask)
    assert output.logits.isfinite().all()
    single = {row: supernet.run(alone(batch, row).tokens, member) for row in range(len(batch)) if batch.mask[row].any()}
    for row, expected in single.items():
        close(output.logits[row, batch.mask[row]], expected.logits[0])
    for index, routing in enumerate(output.routings):
        if routing is not None:
            loads = [expected.routings[index].load for expected in single.values()]
            assert len(routing.probabilities) == batch.mask.sum()
            assert torch.equal(routing.load, sum(loads, torch.zeros_like(routing.load)))


@pytest.mark.parametrize("backbone", PADDED.values(), ids=PADDED)
@torch.no_grad()
def test_the_content_of_padding_does_not_matter(backbone: Backbone) -> None:
    model = randomised(Transformer(network(backbone, SPARSE, DENSE), 23))
    batch = padded_batch([(2, 9), (0, 5), (4, 6)], 9)
    other = torch.where(batch.mask, batch.tokens, (batch.tokens + 1) % 23)
    found, expected = (model.run(tokens, mask=batch.mask) for tokens in (other, batch.tokens))
    close(found.logits[batch.mask], expected.logits[batch.mask])
    assert torch.equal(found.routings[0].load, expected.routings[0].load)


@torch.no_grad()
def test_a_mask_without_padding_is_no_mask() -> None:
    for backbone in PADDED.values():
        model, tokens = randomised(Transformer(network(backbone, SPARSE, DENSE), 23)), tokens_of(3, 9)
        close(model(tokens, mask=torch.ones(3, 9, dtype=torch.bool)), model(tokens))


@given(
    mask=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3),
    length=st.integers(1, 6),
    causal=st.booleans(),
)
def test_tokens_see_only_tokens_and_padding_sees_something(mask: list[list[bool]], length: int, causal: bool) -> None:
    """A softmax over nothing is NaN in some of torch's implementations."""
    seen = _seen(Inputs(causal, torch.tensor(mask)), length, 6, torch.device("cpu"))
    assert seen.shape == (len(mask), 1, length, 6)
    assert seen.any(-1).all()
    for row, places in enumerate(mask):
        for query in range(length):
            own = 6 - length + query
            if places[own]:
                expected = [there and (at <= own or not causal) for at, there in enumerate(places)]
                assert seen[row, 0, query].tolist() == expected


# ---------------------------------------------------------------- learning


@given(backbone=backbones(), causal=st.booleans(), shape=batches)
def test_the_gradient_of_a_padded_batch_is_that_of_its_tokens(backbone: Backbone, causal: bool, shape) -> None:
    """The loss is the mean over tokens, so a sequence counts by its length and one of padding alone not at all."""
    model = randomised(Transformer(network(backbone, SPARSE, DENSE, causal=causal), 23))
    batch = padded_batch(*shape)
    counts = batch.counts().tolist()
    assert counts == [stop - start for start, stop in shape[0]]
    loss = batch.mean(cross_entropy(model.run(batch.tokens, mask=batch.mask), batch))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=False)
    total = torch.zeros(())
    for row, count in enumerate(counts):
        if count:
            single = alone(batch, row)
            part = cross_entropy(model.run(single.tokens), single).sum() / sum(counts)
            part.backward()
            total += part.detach()
    torch.testing.assert_close(loss.detach(), total, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 1e-3 * parameter.grad.norm() + 1e-5, name


def test_the_balance_loss_is_that_of_the_tokens() -> None:
    model = randomised(Transformer(network(PADDED["rotary"], SPARSE, DENSE), 23))
    places = [(2, 9), (0, 5), (0, 0)]
    batch = padded_batch(places, 9)
    output = model.run(batch.tokens, mask=batch.mask)
    routings = [model.run(alone(batch, row).tokens).routings[0] for row in range(2)]
    probabilities = torch.cat([routing.probabilities for routing in routings]).mean(0)
    pairs = sum(routing.load for routing in routings)
    expected = 3 * (pairs / pairs.sum()) @ probabilities
    torch.testing.assert_close(output.balance_loss(), expected)


def test_rows_of_only_padding_have_no_balance_loss_and_finite_gradients() -> None:
    """As one process of several may get them."""
    model = randomised(Transformer(network(PADDED["rotary"], SPARSE, DENSE), 23))
    batch = padded_batch([(0, 0), (0, 0)], 5)
    output = model.run(batch.tokens, mask=batch.mask)
    loss = batch.mean(cross_entropy(output, batch)) + output.balance_loss()
    assert loss == 0
    loss.backward()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_training_takes_the_mean_over_tokens(tmp_path) -> None:
    model = randomised(Transformer(network(PADDED["rotary"], SPARSE, DENSE), 23))
    batch = padded_batch([(0, 9), (3, 5), (0, 0), (4, 5)], 9)
    singles = [alone(batch, row) for row in (0, 1, 3)]
    with torch.no_grad():
        expected = sum(float(cross_entropy(model.run(one.tokens), one).sum()) for one in singles) / 12
    settings = TrainSettings(1, learning_rate=1e-3, warmup_steps=1, log_every=1)
    train(model, TrainData(lambda step: batch, lambda step: [model.architecture]), settings, tmp_path, "run")
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# ---------------------------------------------------------------- decoding

WINDOWED = Layer(Attention(4, 1), FeedForward((32, 16), Router("top_k", k=1)))


@torch.no_grad()
def continued(
    model: Transformer, prompts: Batch, following: Tensor, cuts: list[int], architecture: Architecture
) -> Tensor:
    """Logits of ``following``, fed one by one after prompts that are fed in pieces up to each of ``cuts``."""
    cache = KeyValueCache(architecture, len(prompts), prompts.tokens.shape[1] + following.shape[1])
    for start, stop in zip([0, *cuts], [*cuts, prompts.tokens.shape[1]], strict=True):
        mask = prompts.mask[:, start:stop]
        logits = model.run(prompts.tokens[:, start:stop], architecture, cache, mask).logits
        assert logits.isfinite().all()
    steps = [model.run(following[:, i : i + 1], architecture, cache).logits for i in range(following.shape[1])]
    assert cache.length == cache.capacity
    return torch.cat(steps, 1)


@pytest.mark.parametrize("backbone", PADDED.values(), ids=PADDED)
@torch.no_grad()
def test_prompts_padded_on_the_left_are_continued_as_if_alone(backbone: Backbone) -> None:
    architecture = network(backbone, SPARSE, DENSE, WINDOWED)
    model, lengths, width = randomised(Transformer(architecture, 23)), [5, 2, 0], 5
    prompts, following = padded_batch([(width - n, width) for n in lengths], width), tokens_of(3, 3, seed=1)
    found = continued(model, prompts, following, [], architecture)
    for row, length in enumerate(lengths):
        whole = torch.cat([alone(prompts, row).tokens[0], following[row]])[None]
        close(found[row], model(whole)[0, length:])


@given(
    backbone=backbones(),
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    cuts=st.sets(st.integers(1, 6), max_size=2).map(sorted),
)
@torch.no_grad()
def test_a_slice_continues_padded_prompts_in_pieces_as_if_alone(backbone, seed: int, lengths, cuts) -> None:
    """A first piece may be padding alone for some sequences."""
    supernet = randomised(Transformer(on(backbone, SPACE.envelope), 23))
    member = on(backbone, SPACE.sample_balanced(Random(seed)))
    prompts, following = padded_batch([(7 - n, 7) for n in lengths], 7, seed), tokens_of(len(lengths), 3, seed + 1)
    found = continued(supernet, prompts, following, cuts, member)
    for row, length in enumerate(lengths):
        whole = torch.cat([alone(prompts, row).tokens[0], following[row]])[None]
        close(found[row], supernet(whole, member)[0, length:])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("backbone", PADDED.values(), ids=PADDED)
@torch.no_grad()
def test_the_first_pass_through_a_cache_is_that_without_one(backbone: Backbone, side: str) -> None:
    architecture = network(backbone, SPARSE, DENSE)
    model = randomised(Transformer(architecture, 23))
    batch = padded_batch([SIDES[side](length, 7) for length in (7, 3, 0)], 7)
    cached = model.run(batch.tokens, cache=KeyValueCache(architecture, 3, 9), mask=batch.mask)
    plain = model.run(batch.tokens, mask=batch.mask)
    close(cached.logits[batch.mask], plain.logits[batch.mask])
    assert torch.equal(cached.routings[0].load, plain.routings[0].load)


@torch.no_grad()
def test_a_shortened_cache_forgets_padding_too() -> None:
    architecture = network(PADDED["learned"], SPARSE, DENSE)
    model, tokens = randomised(Transformer(architecture, 23)), tokens_of(2, 6)
    cache = KeyValueCache(architecture, 2, 6)
    model.run(tokens, cache=cache, mask=torch.arange(6).expand(2, 6) >= 4)
    cache.length = 0
    close(model.run(tokens[:, :4], cache=cache).logits, model(tokens[:, :4]))
    close(model.run(tokens[:, 4:], cache=cache).logits, model(tokens)[:, 4:])
