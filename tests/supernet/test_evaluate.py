from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, Router, SearchSpace, Stack
from moesaic.supernet import Batch, Judge, TrainData, TrainSettings, Transformer, evaluate, train
from moesaic.supernet.evaluate import _mean_and_error
from moesaic.supernet.losses import LOSSES
from tests.supernet.network_tools import SPACE, VOCABULARY, backbones, on, padded_batch, randomised


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


@pytest.mark.parametrize("make", [shifted, lambda windows: padded_batch([(0, 8), (2, 5), (3, 4)], 8)])
def test_few_logits_are_held_at_once_and_the_loss_is_the_same(make, make_model, make_tokens, monkeypatch) -> None:
    model, batch = make_model(mixed_layers()), make(make_tokens(3, 9))
    whole, largest = evaluate(model, batch), []
    logits = Transformer.logits

    def recorded(self: Transformer, states: torch.Tensor) -> torch.Tensor:
        found = logits(self, states)
        largest.append(found.numel())
        return found

    monkeypatch.setattr(Transformer, "logits", recorded)
    for allowed in (1, 3 * model.vocab_size, 7 * model.vocab_size):
        monkeypatch.setattr(sys.modules["moesaic.supernet.evaluate"], "_LOGITS", allowed)
        found = evaluate(model, batch)
        assert max(largest) <= max(allowed, 3 * model.vocab_size)  # one position of the three sequences at least
        largest.clear()
        assert found.sequence_losses == pytest.approx(whole.sequence_losses, rel=1e-6, nan_ok=True)
        assert found.loads == whole.loads


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


def test_one_sequence_has_an_infinite_error(make_model, make_tokens) -> None:
    assert evaluate(make_model(mixed_layers()), shifted(make_tokens(1, 9))).standard_error == math.inf


def test_every_batch_is_reported(make_model, make_tokens) -> None:
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
def test_padding_is_not_counted(make_model, make_tokens) -> None:
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


def test_sequences_of_only_padding_are_not_counted(make_model, make_tokens) -> None:
    model, (batch, _) = make_model(mixed_layers()), padded(make_tokens, [9, 0, 4, 0, 7, 0], 9)
    there = torch.tensor([0, 2, 4])
    assert batch.mask is not None
    expected = evaluate(model, Batch(batch.tokens[there], batch.targets[there], batch.mask[there]))
    for rows in (1, 4):  # one at a time, three runs see no token at all
        found = evaluate(model, batch, rows=rows)
        assert found.tokens == expected.tokens == 20
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-4)
        assert found.sequence_losses[1::2] == (0.0, 0.0, 0.0)
        for one, other in zip(found.loads, expected.loads, strict=True):
            assert (one and one.pairs_per_token) == (other and pytest.approx(other.pairs_per_token))
    one_token = evaluate(model, padded(make_tokens, [1, 0], 9)[0])
    assert one_token.standard_error == math.inf  # one sequence and an empty one are one sequence


def test_the_error_of_a_mean_over_unequal_sequences_is_that_of_a_ratio(make_model, make_tokens) -> None:
    """Against its definition: sums of losses over sums of counts, linearised around the mean."""
    model, (batch, _) = make_model(mixed_layers()), padded(make_tokens, [9, 4, 1, 7, 3], 9)
    found = evaluate(model, batch)
    assert found.standard_error == pytest.approx(ratio_error(found.sequence_losses, [9, 4, 1, 7, 3]), rel=1e-6)


def ratio_error(losses: Sequence[float], counts: Sequence[int]) -> float:
    """Cochran 1977, 2.11, without a finite population: R = sum y / sum x, with sums y of losses over x tokens."""
    sums = [loss * count for loss, count in zip(losses, counts, strict=True)]
    ratio, number = sum(sums) / sum(counts), len(counts)
    spread = sum((y - ratio * x) ** 2 for y, x in zip(sums, counts, strict=True)) / (number - 1)
    return math.sqrt(spread / number) / (sum(counts) / number)


sequences = st.lists(st.tuples(st.floats(0, 10), st.integers(0, 50)), min_size=2, max_size=12)


@given(sequences.filter(lambda found: sum(count > 0 for _, count in found) > 1))
def test_mean_and_error_are_those_of_the_sequences_with_tokens(found: list[tuple[float, int]]) -> None:
    losses, counts = (torch.tensor(part, dtype=torch.float64) for part in zip(*found, strict=True))
    mean, error = _mean_and_error(losses, counts)
    there = [(loss, count) for loss, count in found if count]
    assert mean == pytest.approx(sum(loss * count for loss, count in there) / sum(count for _, count in there))
    assert error == pytest.approx(ratio_error(*zip(*there, strict=True)), abs=1e-9)


def test_the_error_is_the_standard_deviation_of_the_mean() -> None:
    """Over many draws of sequences whose lengths and losses go together, as those of short ones are higher."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 30, (3000, 60), generator=generator).double()
    losses = 5 - 0.1 * counts + torch.randn(counts.shape, generator=generator).double()
    found = [_mean_and_error(*row) for row in zip(losses, counts, strict=True)]
    errors = statistics.fmean(error for _, error in found)
    assert errors == pytest.approx(statistics.stdev(mean for mean, _ in found), rel=0.05)


def elsewhere(judge: Judge) -> tuple[Judge, dict[str, np.ndarray]]:
    """The judge that another process makes of what ``plain`` says, with arrays that it may only read."""
    facts, arrays = judge.plain()
    for array in arrays.values():
        array.flags.writeable = False
    return Judge.of(json.loads(json.dumps(facts)), arrays, torch.device("cpu")), arrays


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_judge_made_elsewhere_gives_the_same_evaluations(tiny_space: SearchSpace, make_model, make_tokens) -> None:
    model, (batch, _) = make_model(tiny_space.envelope, "packed"), padded(make_tokens, [9, 4], 9)
    judgements = set()
    for held_out in (batch, shifted(make_tokens(4, 9))):
        for bfloat16 in (False, True):
            judge = Judge(model, held_out, bfloat16)
            other, _ = elsewhere(judge)
            for architecture in (tiny_space.largest, tiny_space.smallest):
                assert other(architecture) == judge(architecture)
                judgements.add(judge(architecture).loss)
    assert len(judgements) == 8  # no two of them are alike, so that nothing was left behind


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@given(backbone=backbones(), causal=st.booleans(), seed=st.integers(0, 10**6))
def test_a_judge_on_any_backbone_is_made_elsewhere(backbone: Backbone, causal: bool, seed: int) -> None:
    model = randomised(Transformer(on(backbone, SPACE.envelope, causal), VOCABULARY), seed)
    judge = Judge(model, padded_batch([(0, 5), (2, 7)], 7, seed))
    other, _ = elsewhere(judge)
    member = on(backbone, SPACE.sample_balanced(Random(seed)), causal)
    assert other(member) == judge(member)
    assert other.model.architecture == model.architecture


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_judge_made_elsewhere_copies_nothing_and_keeps_its_loss(
    tiny_space: SearchSpace, make_model, make_tokens, monkeypatch
) -> None:
    monkeypatch.setitem(LOSSES, "doubled", lambda output, batch: 2 * LOSSES["cross_entropy"](output, batch))
    judge = Judge(make_model(tiny_space.envelope), shifted(make_tokens(4, 9)), loss="doubled")
    other, arrays = elsewhere(judge)
    assert other(tiny_space.largest) == judge(tiny_space.largest)
    plain = evaluate(judge.model, judge.batch, tiny_space.largest)
    assert judge(tiny_space.largest).loss == pytest.approx(2 * plain.loss)
    for name, parameter in other.model.named_parameters():
        assert parameter.data_ptr() == arrays[f"model.{name}"].ctypes.data
    assert not other.model.training
