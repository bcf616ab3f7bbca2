from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.search_spaces import Interrupted, MoesaicError, SearchSpace, StageFailed
from moesaic.supernet import Batch, SliceSampler, TrainData, TrainSettings, Transformer, evaluate, train
from moesaic.supernet.checkpoint import load_tensors
from moesaic.supernet.metrics import MetricLog, read_metrics
from moesaic.supernet.train import CHECKPOINT

MakeModel = Callable[..., Transformer]
SETTINGS = TrainSettings(steps=12, learning_rate=1e-2, warmup_steps=3, checkpoint_every=4, log_every=1)


def batch(step: int) -> Batch:
    """Sequences that counts upwards: the next token follows from the last."""
    starts = torch.randint(0, 23, (4, 1), generator=torch.Generator().manual_seed(step))
    windows = (starts + torch.arange(9)) % 23
    return Batch(windows[:, :-1], windows[:, 1:])


@pytest.fixture
def run(tiny_space: SearchSpace, make_model: MakeModel) -> Callable[..., Transformer]:
    data = TrainData(batch, SliceSampler(tiny_space, seed=0).slices)

    def start(directory: Path, settings: TrainSettings = SETTINGS, **options: Any) -> Transformer:
        """Train a fresh copy of one model in ``directory``."""
        model = options.pop("model", None) or make_model(tiny_space.envelope, scale=1.0)
        train(model, options.pop("data", data), settings, directory, options.pop("identity", "run 1"), **options)
        return model

    return start


def figures(directory: Path) -> list[dict[str, float]]:
    """Everything logged but the time it took."""
    records = read_metrics(directory / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name != "seconds_per_step"} for record in records]


def assert_same_weights(one: Transformer, other: Transformer) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def stop_at(step: int) -> Callable[[], bool]:
    asked = iter(range(1000))
    return lambda: next(asked) == step


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("stop", [0, 5, 8])
def test_a_stopped_run_continues_bit_for_bit(run, tmp_path: Path, stop: int) -> None:
    straight = run(tmp_path / "straight")
    with pytest.raises(Interrupted, match=f"stopped at step {stop} of 12"):
        run(tmp_path / "stopped", should_stop=stop_at(stop))
    assert len(figures(tmp_path / "stopped")) == stop
    resumed = run(tmp_path / "stopped")
    assert [record["step"] for record in figures(tmp_path / "stopped")] == list(range(12))
    assert figures(tmp_path / "stopped") == figures(tmp_path / "straight")
    assert_same_weights(resumed, straight)
    kept, metadata = load_tensors(tmp_path / "stopped" / CHECKPOINT)
    expected, expected_metadata = load_tensors(tmp_path / "straight" / CHECKPOINT)
    assert metadata == expected_metadata
    assert kept.keys() == expected.keys()
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in kept)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.items())


class Killed(BaseException):
    """What a test raises in place of a signal."""


def kill_after(step: int) -> Callable[[int, dict[str, float]], None]:
    def on_step(done: int, record: dict[str, float]) -> None:
        if done == step:
            raise Killed

    return on_step


def test_a_killed_run_continues_from_its_last_checkpoint_without_a_step_twice(run, tmp_path: Path) -> None:
    straight = run(tmp_path / "straight")
    with pytest.raises(Killed):
        run(tmp_path / "killed", on_step=kill_after(7))
    metrics = tmp_path / "killed" / "metrics.jsonl"
    assert [record["step"] for record in figures(tmp_path / "killed")] == list(range(7))  # the checkpoint is of step 4
    metrics.write_text(metrics.read_text() + '{"step": 7, "lo')  # a line torn by the kill
    seen: list[int] = []
    resumed = run(tmp_path / "killed", on_step=lambda step, record: seen.append(step))
    assert seen == list(range(5, 13))
    assert figures(tmp_path / "killed") == figures(tmp_path / "straight")
    assert_same_weights(resumed, straight)


def test_a_run_killed_as_it_resumes_keeps_its_figures(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(6)))
    log = MetricLog(tmp_path, resume_step=4)
    try:
        assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
        log.write({"step": 4, "loss": 1.5})
        assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": 4, "loss": 1.5}
    finally:
        log.close()


def test_a_finished_run_has_nothing_left_to_do(run, tmp_path: Path) -> None:
    first = run(tmp_path)
    before = figures(tmp_path)
    again = run(tmp_path, on_step=lambda step, record: pytest.fail("trained again"))
    assert_same_weights(first, again)
    assert figures(tmp_path) == before


def test_a_longer_run_of_the_same_identity_continues(run, tmp_path: Path) -> None:
    run(tmp_path, replace(SETTINGS, steps=4))
    run(tmp_path)
    assert [record["step"] for record in figures(tmp_path)] == list(range(12))


# ---------------------------------------------------------------- what is refused


def test_a_checkpoint_of_another_run_is_refused(run, tmp_path: Path) -> None:
    run(tmp_path)
    kept = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(MoesaicError, match="another run") as caught:
        run(tmp_path, identity="run 2")
    assert caught.value.where == str(tmp_path / CHECKPOINT)
    assert (caught.value.found, caught.value.allowed) == ("run 1", "run 2")
    assert (tmp_path / CHECKPOINT).read_bytes() == kept
    assert len(figures(tmp_path)) == 12


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_truncated_checkpoint_is_refused(run, tmp_path: Path, share: float) -> None:
    run(tmp_path)
    content = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(MoesaicError, match="truncated") as caught:
        run(tmp_path)
    assert caught.value.where == str(tmp_path / CHECKPOINT)


def test_a_checkpoint_of_another_model_is_refused(run, tmp_path: Path, tiny_space, make_model) -> None:
    run(tmp_path)
    with pytest.raises(MoesaicError, match="another model"):
        run(tmp_path, model=make_model(tiny_space.smallest))


def test_a_place_that_cannot_be_written_is_named(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(MoesaicError) as caught:
        run(tmp_path / "file" / "run")
    assert str(tmp_path / "file") in str(caught.value.where)
    assert (tmp_path / "file").read_text() == "kept"


# ---------------------------------------------------------------- divergence


def test_divergence_is_reported_and_the_last_good_checkpoint_kept(run, tmp_path: Path) -> None:
    run(tmp_path, replace(SETTINGS, steps=4))
    kept = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(StageFailed, match="diverged at step 5") as caught:
        run(tmp_path, replace(SETTINGS, learning_rate=1e30, checkpoint_every=100))
    assert str(tmp_path / CHECKPOINT) in str(caught.value)
    assert "1e+30" in str(caught.value.found)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept
    assert all(math.isfinite(value) for record in figures(tmp_path) for value in record.values())


def test_a_nan_among_the_weights_is_reported_before_anything_is_written(
    run, tmp_path: Path, tiny_space, make_model
) -> None:
    model = make_model(tiny_space.envelope)
    with torch.no_grad():
        model.layers[0].attention.q[0, 0] = math.nan
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(StageFailed, match="diverged at step 0") as caught:
        run(tmp_path, model=model)
    assert "none was written yet" in str(caught.value)
    assert not (tmp_path / CHECKPOINT).exists()
    assert all(torch.equal(p.nan_to_num(7), before[n].nan_to_num(7)) for n, p in model.named_parameters())


def test_a_nan_that_appears_in_training_leaves_the_checkpoint_before_it(run, tmp_path, tiny_space, make_model) -> None:
    model = make_model(tiny_space.envelope)

    def poison(step: int, record: dict[str, float]) -> None:
        if step == 6:
            with torch.no_grad():
                model.get_parameter("stacks.decoder.norm.weight")[0] = math.nan

    with pytest.raises(StageFailed, match="diverged at step 6"):
        run(tmp_path, model=model, on_step=poison)
    resumed = run(tmp_path, replace(SETTINGS, steps=4))  # nothing left to do: the checkpoint is of step 4
    assert all(p.isfinite().all() for p in resumed.parameters())
    assert [record["step"] for record in figures(tmp_path)] == [0, 1, 2, 3]


# ---------------------------------------------------------------- optimisation


def test_a_learnable_sequence_is_learnt_by_every_slice(run, tmp_path: Path, tiny_space: SearchSpace) -> None:
    model = run(tmp_path, replace(SETTINGS, steps=150))
    assert figures(tmp_path)[0]["loss"] == pytest.approx(math.log(23), abs=0.3)
    for slice_ in (tiny_space.largest, tiny_space.smallest, *SliceSampler(tiny_space, seed=1).slices(0)):
        assert evaluate(model, batch(0), slice_).loss < 0.5 * math.log(23)


def test_a_single_model_trains_alone(run, tmp_path: Path, tiny_space: SearchSpace, make_model: MakeModel) -> None:
    model = make_model(tiny_space.largest, scale=1.0)
    run(tmp_path, replace(SETTINGS, steps=40), model=model, data=TrainData(batch, lambda step: [tiny_space.largest]))
    assert figures(tmp_path)[-1]["loss"] < 0.5 * figures(tmp_path)[0]["loss"]


def test_a_step_is_the_mean_over_its_slices(run, tmp_path: Path, tiny_space, make_model) -> None:
    """One step's gradient and figures by hand."""
    model = make_model(tiny_space.envelope)
    twin = make_model(tiny_space.envelope)
    slices = [tiny_space.largest, tiny_space.smallest]
    settings = replace(SETTINGS, steps=1, balance_weight=0.5, clip_norm=1e9)
    run(tmp_path, settings, model=model, data=TrainData(batch, lambda step: slices))
    tokens, targets = batch(0).tokens, batch(0).targets
    outputs = [twin.run(tokens, a) for a in slices]
    loss = sum(-o.logits.log_softmax(-1).gather(-1, targets[..., None]).mean() for o in outputs) / 2
    balance = sum(o.balance_loss() for o in outputs) / 2
    (loss + 0.5 * balance).backward()
    assert figures(tmp_path)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert figures(tmp_path)[0]["balance"] == pytest.approx(balance.item(), rel=1e-5)
    for (name, mine), (_, expected) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if expected.grad is not None:
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_learning_rate_warms_up_and_falls_to_a_tenth_along_a_cosine(run, tmp_path: Path) -> None:
    settings = TrainSettings(steps=110, learning_rate=0.5, warmup_steps=10)
    rates = [settings.learning_rate_at(step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert rates[10] == pytest.approx(0.5)
    assert rates[60] == pytest.approx((0.5 + 0.05) / 2)
    assert rates[35] == pytest.approx(0.05 + 0.45 * (1 + math.sqrt(0.5)) / 2)
    assert rates[110] == pytest.approx(0.05)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    run(tmp_path)
    assert [r["learning_rate"] for r in figures(tmp_path)] == [SETTINGS.learning_rate_at(step) for step in range(12)]


def test_gradients_are_clipped_and_the_norm_before_clipping_is_logged(run, tmp_path: Path) -> None:
    for name, limit in (("tight", 1e-3), ("loose", 1e3)):
        model = run(tmp_path / name, replace(SETTINGS, steps=1, clip_norm=limit))
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
        told = figures(tmp_path / name)[0]["gradient_norm"]
        assert 1e-3 < told < 1e3
        assert norm == pytest.approx(min(told, limit), rel=1e-3)


def test_weight_decay_is_on_matrices_only(run, tmp_path: Path, tiny_space, make_model) -> None:
    models = []
    for decay in (0.0, 0.5):
        model = make_model(tiny_space.envelope)
        models.append(run(tmp_path / str(decay), replace(SETTINGS, steps=1, weight_decay=decay), model=model))
    start = dict(make_model(tiny_space.envelope).named_parameters())
    rate = SETTINGS.learning_rate_at(0)
    for (name, plain), (_, decayed) in zip(*(m.named_parameters() for m in models), strict=True):
        expected = rate * 0.5 * start[name] if plain.dim() == 2 else torch.zeros_like(plain)
        torch.testing.assert_close(plain - decayed, expected, rtol=1e-3, atol=1e-6)


def test_bfloat16_trains_and_keeps_weights_in_float32(run, tmp_path: Path) -> None:
    model = run(tmp_path, replace(SETTINGS, steps=40, bfloat16=True))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert figures(tmp_path)[-1]["loss"] < 0.6 * figures(tmp_path)[0]["loss"]


def test_metrics_are_logged_as_often_as_asked_and_at_the_end(run, tmp_path: Path) -> None:
    run(tmp_path, replace(SETTINGS, log_every=5))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 5, 10, 11]
    assert list((tmp_path / "tensorboard").iterdir())
