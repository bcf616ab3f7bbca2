from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
import torch.nn.functional as F

from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, Router, SearchSpace, Stack
from moesaic.supernet import Batch, Judge, TrainData, TrainSettings, evaluate, train


def shifted(windows: torch.Tensor) -> Batch:
    return Batch(windows[:, :-1], windows[:, 1:])


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
    found = evaluate(model, shifted(windows), rows=3)
    losses = [F.cross_entropy(model(row[None, :-1])[0], row[1:]).item() for row in windows]
    assert found.loss == pytest.approx(statistics.fmean(losses), rel=1e-5)
    assert found.standard_error == pytest.approx(statistics.stdev(losses) / math.sqrt(7), rel=1e-4)
    assert found.tokens == 7 * 10


def test_the_size_of_batches_does_not_matter(make_model, make_tokens) -> None:
    model, batch = make_model(mixed_layers()), shifted(make_tokens(7, 11))
    whole = evaluate(model, batch)
    for rows in (1, 2, 7):
        found = evaluate(model, batch, rows=rows)
        assert found.loss == pytest.approx(whole.loss, rel=1e-5)
        for one, other in zip(found.loads, whole.loads, strict=True):
            assert (one and one.pairs_per_token) == (other and other.pairs_per_token)


def test_loads_add_up_to_the_experts_per_token(make_model, make_tokens) -> None:
    model, windows = make_model(mixed_layers()), make_tokens(6, 9)
    threshold, dense, top = evaluate(model, shifted(windows), rows=4).loads
    assert dense is None
    assert threshold is not None
    assert top is not None
    routing = model.run(windows[:, :-1]).routings[0]
    assert routing is not None
    assert threshold.pairs_per_token == pytest.approx((routing.load / 48).tolist())
    experts_per_token = sum(threshold.pairs_per_token)
    assert experts_per_token == pytest.approx(len(routing.tokens) / 48)
    assert 1 < experts_per_token < 3
    assert top.pairs_per_token == (1.0, 1.0)


def test_a_slice_is_evaluated_as_its_extracted_model(tiny_space: SearchSpace, make_model, make_tokens) -> None:
    model, batch = make_model(tiny_space.envelope), shifted(make_tokens(5, 9))
    assert evaluate(model, batch, tiny_space.largest) == evaluate(model.extract(tiny_space.largest), batch)


def test_one_sequence_says_nothing_of_its_error(make_model, make_tokens) -> None:
    assert evaluate(make_model(mixed_layers()), shifted(make_tokens(1, 9))).standard_error == math.inf


def test_every_batch_is_told(make_model, make_tokens) -> None:
    told = []
    evaluate(make_model(mixed_layers()), shifted(make_tokens(7, 5)), rows=3, on_rows=lambda: told.append(1))
    assert len(told) == 3


def test_evaluation_leaves_the_model_trainable(tmp_path, make_model, make_tokens) -> None:
    """Angles that are cached during inference must serve the training that follows."""
    architecture = mixed_layers()
    model, batch = make_model(architecture), shifted(make_tokens(3, 14))
    before = {name: p.clone() for name, p in model.named_parameters()}
    evaluate(model, batch)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    data = TrainData(lambda step: batch, lambda step: [architecture])
    train(model, data, TrainSettings(steps=1, learning_rate=1e-3, warmup_steps=1), tmp_path, "run")
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---------------------------------------------------------------- padding, and judges elsewhere


def padded(make_tokens, lengths: list[int], width: int) -> tuple[Batch, list[torch.Tensor]]:
    """Sequences of those lengths at the left of ``width`` places, and each alone."""
    windows = make_tokens(len(lengths), width + 1)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    batch = Batch(windows[:, :-1], windows[:, 1:], mask)
    return batch, [row[: length + 1] for row, length in zip(windows, lengths, strict=True)]


@torch.no_grad()
def test_padding_counts_in_no_figure(make_model, make_tokens) -> None:
    model, (batch, alone) = make_model(mixed_layers()), padded(make_tokens, [9, 4, 1, 7], 9)
    found = evaluate(model, batch, rows=3)
    single = [evaluate(model, shifted(row[None])) for row in alone]
    assert found.tokens == sum(one.tokens for one in single) == 21
    assert found.sequence_losses == pytest.approx([one.loss for one in single], rel=1e-4)
    assert found.loss == pytest.approx(sum(one.loss * one.tokens for one in single) / 21, rel=1e-5)
    for index, load in enumerate(found.loads):
        if load is None:
            continue
        loads = [(one.loads[index], one.tokens) for one in single]
        expected = sum(torch.tensor(one.pairs_per_token) * tokens for one, tokens in loads if one is not None) / 21
        assert load.pairs_per_token == pytest.approx(expected.tolist())


def test_the_error_of_a_mean_over_unequal_sequences_is_that_of_a_ratio(make_model, make_tokens) -> None:
    """Against its definition: sums of losses over sums of counts, linearised around the mean."""
    model, (batch, _) = make_model(mixed_layers()), padded(make_tokens, [9, 4, 1, 7, 3], 9)
    found = evaluate(model, batch)
    counts = [9, 4, 1, 7, 3]
    residuals = [n * (loss - found.loss) for n, loss in zip(counts, found.sequence_losses, strict=True)]
    variance = sum(r * r for r in residuals) / 4 / 5 / statistics.fmean(counts) ** 2
    assert found.standard_error == pytest.approx(math.sqrt(variance))


def test_a_judge_made_elsewhere_judges_alike(tiny_space: SearchSpace, make_model, make_tokens) -> None:
    model, (batch, _) = make_model(tiny_space.envelope, "packed"), padded(make_tokens, [9, 4], 9)
    for held_out in (batch, shifted(make_tokens(4, 9))):
        judge = Judge(model, held_out)
        facts, arrays = judge.plain()
        for array in arrays.values():
            array.flags.writeable = False
        other = Judge.of(json.loads(json.dumps(facts)), arrays, torch.device("cpu"))
        for architecture in (tiny_space.largest, tiny_space.smallest):
            assert other(architecture) == judge(architecture)
