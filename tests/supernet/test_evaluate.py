from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F

from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, Router, SearchSpace, Stack
from moesaic.supernet import Evaluation, TrainData, TrainSettings, evaluate, train


def mixed_layers() -> Architecture:
    parts = (
        FeedForward((32, 16, 16, 16), Router("threshold", threshold=0.6, max_k=3)),
        FeedForward((32,)),
        FeedForward((32, 16), Router("top_k", k=2)),
    )
    return Architecture(Stack(32, tuple(Layer(Attention(2, 1), part) for part in parts)), Backbone(16))


@torch.no_grad()
def test_loss_and_its_standard_error_are_those_of_the_sequences(make_model, make_tokens) -> None:
    model, windows = make_model(mixed_layers()), make_tokens(7, 11)
    found = evaluate(model, windows, batch_size=3)
    losses = [F.cross_entropy(model(row[None, :-1])[0], row[1:]).item() for row in windows]
    assert found.loss == pytest.approx(statistics.fmean(losses), rel=1e-5)
    assert found.standard_error == pytest.approx(statistics.stdev(losses) / math.sqrt(7), rel=1e-4)
    assert found.tokens == 7 * 10
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_the_size_of_batches_does_not_matter(make_model, make_tokens) -> None:
    model, windows = make_model(mixed_layers()), make_tokens(7, 11)
    whole = evaluate(model, windows)
    for batch_size in (1, 2, 7):
        found = evaluate(model, windows, batch_size=batch_size)
        assert found.loss == pytest.approx(whole.loss, rel=1e-5)
        for one, other in zip(found.loads, whole.loads, strict=True):
            assert (one and one.pairs_per_token) == (other and other.pairs_per_token)


def test_loads_add_up_to_the_experts_per_token(make_model, make_tokens) -> None:
    model, windows = make_model(mixed_layers()), make_tokens(6, 9)
    threshold, dense, top = evaluate(model, windows, batch_size=4).loads
    assert dense is None
    assert threshold is not None
    assert top is not None
    routing = model.run(windows[:, :-1]).routings[0]
    assert routing is not None
    assert threshold.pairs_per_token == pytest.approx((routing.load / 48).tolist())
    assert threshold.experts_per_token == pytest.approx(sum(threshold.pairs_per_token))
    assert threshold.experts_per_token == pytest.approx(len(routing.tokens) / 48)
    assert 1 < threshold.experts_per_token < 3
    assert top.pairs_per_token == (1.0, 1.0)


def test_a_slice_is_evaluated_as_its_extracted_model(tiny_space: SearchSpace, make_model, make_tokens) -> None:
    model, windows = make_model(tiny_space.envelope), make_tokens(5, 9)
    assert evaluate(model, windows, tiny_space.largest) == evaluate(model.extract(tiny_space.largest), windows)


def test_one_sequence_says_nothing_of_its_error(make_model, make_tokens) -> None:
    assert evaluate(make_model(mixed_layers()), make_tokens(1, 9)).standard_error == math.inf


def test_perplexity_of_a_huge_loss_is_infinite() -> None:
    assert Evaluation(1e4, 0.0, 1, ()).perplexity == math.inf


def test_every_batch_is_told(make_model, make_tokens) -> None:
    told = []
    evaluate(make_model(mixed_layers()), make_tokens(7, 5), batch_size=3, on_batch=lambda: told.append(1))
    assert len(told) == 3


def test_evaluation_leaves_the_model_trainable(tmp_path, make_model, make_tokens) -> None:
    """Angles that are cached during inference must serve the training that follows."""
    architecture = mixed_layers()
    model, windows = make_model(architecture), make_tokens(3, 14)
    before = {name: p.clone() for name, p in model.named_parameters()}
    evaluate(model, windows)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    data = TrainData(lambda step: windows, lambda step: [architecture])
    train(model, data, TrainSettings(steps=1, learning_rate=1e-3, warmup_steps=1), tmp_path, "run")
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
