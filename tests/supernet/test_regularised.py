"""Label smoothing and dropout: the formulas, what they leave alone, and that a step with them can be repeated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.search_spaces import Architecture, SearchSpace
from moesaic.supernet import Batch, TrainData, TrainSettings, Transformer, evaluate, train
from moesaic.supernet.dropout import Dropout
from moesaic.supernet.losses import LOSSES, uniform_cross_entropy
from moesaic.supernet.metrics import read_metrics
from moesaic.supernet.model import Output
from tests.search_spaces.two_stacks import two_stack_space
from tests.supernet.test_train import assert_same_weights, batch, stop_at

CPU = torch.device("cpu")
SETTINGS = TrainSettings(steps=10, learning_rate=1e-2, warmup_steps=2, checkpoint_every=4, log_every=1)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.floats(0, 0.9), st.integers(0, 99))
def test_smoothing_is_that_of_torch(vocabulary: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 5, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (2, 5), generator=generator)
    output, data = Output(logits, ()), Batch(targets, targets)
    mixed = (1 - share) * LOSSES["cross_entropy"](output, data) + share * uniform_cross_entropy(output)
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, reduction="none", label_smoothing=share
    )
    assert torch.allclose(mixed, expected, atol=1e-5)


def test_a_step_minimises_the_smoothed_loss_and_reports_the_other(tiny_space, make_model, tmp_path: Path) -> None:
    architecture = tiny_space.smallest
    data = TrainData(batch, lambda step: [architecture])
    plain, smoothed = (make_model(architecture, scale=1.0) for _ in range(2))
    one = replace(SETTINGS, steps=1, balance_weight=0.0, clip_norm=None)
    before = evaluate(plain, batch(0)).loss
    train(plain, data, one, tmp_path / "plain", "run")
    train(smoothed, data, replace(one, label_smoothing=0.3), tmp_path / "smoothed", "run")
    records = [read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("plain", "smoothed")]
    assert records[0]["loss"] == records[1]["loss"] == pytest.approx(before, rel=1e-5)
    model = make_model(architecture, scale=1.0)
    output = model.run(batch(0).tokens)
    torch.nn.functional.cross_entropy(
        output.logits.flatten(0, 1), batch(0).targets.flatten(), label_smoothing=0.3
    ).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    assert records[1]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert records[0]["gradient_norm"] != pytest.approx(norm.item(), rel=1e-2)


def test_what_is_dropped_is_a_function_of_the_seeds() -> None:
    x = torch.ones(40, 50)

    def drops(*seeds: int) -> torch.Tensor:
        dropout = Dropout.of(0.25, CPU, *seeds)
        assert dropout is not None
        return torch.stack([dropout(x), dropout(x)])

    assert torch.equal(drops(0, 1), drops(0, 1))
    assert not torch.equal(*drops(0, 1))
    several = [drops(*seeds) for seeds in ((0, 1), (1, 0), (0, 1, 0), (0, 11), (2**80, 1))]
    assert len({tuple(one.flatten().tolist()) for one in several}) == len(several)
    assert drops(0, 1).unique().tolist() == pytest.approx([0, 4 / 3])
    assert drops(0, 1).mean() == pytest.approx(1, abs=0.03)
    assert Dropout.of(0, CPU, 0) is None


def translating() -> Architecture:
    return two_stack_space().largest


def read(model: Transformer, dropout: Dropout | None) -> torch.Tensor:
    ids = torch.arange(12).view(2, 6)
    return model.run(ids, source=ids if model.architecture.encoder else None, dropout=dropout).logits


@pytest.mark.parametrize("translates", [False, True])
def test_dropout_leaves_nothing_behind(translates: bool, tiny_space: SearchSpace, make_model) -> None:
    model = make_model(translating() if translates else tiny_space.largest, scale=1.0)
    state, before = torch.get_rng_state(), read(model, None)
    first, second = (read(model, Dropout.of(0.5, CPU, 3, 7)) for _ in range(2))
    assert torch.equal(first, second) and not torch.allclose(first, before)
    assert torch.equal(read(model, None), before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("place", ["pre", "post"])
def test_every_part_is_dropped_where_the_transformer_drops_it(place: str, make_model, monkeypatch) -> None:
    """Embeddings of both stacks, and attention, cross-attention and feed-forward of every layer."""
    architecture = translating()
    backbone = replace(architecture.backbone, norm_place=place)
    architecture, seen = replace(architecture, backbone=backbone), []
    monkeypatch.setattr(Dropout, "__call__", lambda self, x: seen.append(x.shape) or x)
    model = make_model(architecture, scale=1.0)
    read(model, Dropout.of(0.5, CPU, 0))
    parts = sum(2 + (layer.cross is not None) for layer in architecture.layers.values())
    assert len(seen) == len(architecture.stacks) + parts


@pytest.mark.parametrize("stop", [1, 6])
def test_a_stopped_training_with_dropout_continues_bit_for_bit(stop: int, tiny_space, make_model, tmp_path) -> None:
    architecture = tiny_space.largest
    chosen = replace(SETTINGS, dropout=0.3, label_smoothing=0.1)

    def start(folder: str, seed: int = 0, **options) -> Transformer:
        model = make_model(architecture, scale=1.0)
        train(
            model, TrainData(batch, lambda step: [architecture], seed=seed), chosen, tmp_path / folder, "run", **options
        )
        return model

    whole = start("whole")
    with pytest.raises(Exception, match="stopped at step"):
        start("stopped", should_stop=stop_at(stop))
    assert_same_weights(start("stopped"), whole)
    with pytest.raises(AssertionError):
        assert_same_weights(start("other", seed=1), whole)
