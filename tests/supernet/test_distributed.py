"""Two processes train as one: gradients, metrics, checkpoints for any number of workers, and a common end.

Both are started once and run every scenario in turn; each test checks the result of one scenario.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.search_spaces import Architecture, Interrupted, MoesaicError, SearchSpace, load_space
from moesaic.search_spaces.yaml_source import YamlSource
from moesaic.supernet import Batch, SliceSampler, TrainData, TrainSettings, Transformer, train
from moesaic.supernet.checkpoint import load_tensors
from moesaic.supernet.distributed import Ranks, joined, used_parameters
from moesaic.supernet.metrics import read_metrics
from moesaic.supernet.train import CHECKPOINT

VOCABULARY, STEPS = 23, 8
SETTINGS = TrainSettings(STEPS, learning_rate=1e-4, warmup_steps=2, balance_weight=0.0, checkpoint_every=4, log_every=1)
SPACE = load_space(YamlSource("test", "tiny"))
SAMPLER = SliceSampler(SPACE, seed=0)


def SLICES(step: int) -> list[Architecture]:
    """Two slices a step, so that gradients add up."""
    return [*SAMPLER.slices(2 * step), *SAMPLER.slices(2 * step + 1)]


CPU = torch.device("cpu")


def batch(step: int) -> Batch:
    return shifted(torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(step)))


def shifted(windows: Tensor) -> Batch:
    return Batch(windows[:, :-1], windows[:, 1:])


def padded(step: int) -> Batch:
    """Sequences of unequal lengths: the second process has fewer tokens, in the first step none."""
    whole = batch(step)
    lengths = torch.tensor([8, 0, 5, 0] if step == 0 else [3 + step % 6, 1, 8, 1 + step % 3])
    return Batch(whole.tokens, whole.targets, torch.arange(8)[None] < lengths[:, None])


def fresh_model(envelope: Architecture = SPACE.envelope) -> Transformer:
    """With weights large enough for slices to differ."""
    torch.manual_seed(0)
    model = Transformer(envelope, VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def run(directory: Path, ranks: Ranks | None = None, until: int = STEPS, **options) -> None:
    """Train a fresh model in ``directory`` up to a step of the whole training."""
    data = options.pop("data", TrainData(batch, SLICES))
    settings = options.pop("settings", SETTINGS)
    if until < STEPS:
        asked = iter(range(STEPS))
        options["should_stop"] = lambda: next(asked) == until
    train(fresh_model(), data, settings, directory, "run", ranks=ranks or Ranks(), **options)


# ---------------------------------------------------------------- what both processes do


def _plain(folder: Path, ranks: Ranks) -> None:
    run(folder / "plain", ranks)


def _padded(folder: Path, ranks: Ranks) -> None:
    run(folder / "padded", ranks, data=TrainData(padded, SLICES))


def _continued(folder: Path, ranks: Ranks) -> None:
    """From a checkpoint of one process to step 6; the test goes on from there."""
    asked = iter(range(3, STEPS))
    run(folder / "continued", ranks, should_stop=lambda: next(asked) == 6)


def _stopped_by_the_second(folder: Path, ranks: Ranks) -> None:
    asked = iter(range(STEPS))
    run(folder / "stopped", ranks, should_stop=lambda: next(asked) == 3 and ranks.rank == 1)


def _diverging_in_the_second(folder: Path, ranks: Ranks) -> None:
    """Its rows alone give a loss that is not finite: tokens whose embedding is infinite."""
    model = fresh_model()
    with torch.no_grad():
        model.get_parameter("stacks.decoder.embedding.weight")[VOCABULARY - 1] = math.inf
    safe, poisoned = torch.zeros(2, 9, dtype=torch.long), torch.full((2, 9), VOCABULARY - 1)
    data = TrainData(lambda step: shifted(torch.stack([safe, poisoned], 1).flatten(0, 1)), SLICES)
    train(model, data, SETTINGS, folder / "diverged", "run", ranks=ranks)


def _uneven(folder: Path, ranks: Ranks) -> None:
    run(folder / "uneven", ranks, data=TrainData(lambda step: batch(step)[slice(3)], SLICES))


def _missing_gradient(folder: Path, ranks: Ranks) -> None:
    model = fresh_model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    if ranks.rank == 1:
        model.layers[0].feed_forward.up.grad = None
    ranks.average_gradients(model, [SPACE.largest])
    assert all(
        (p.grad == 3).all() for n, p in model.named_parameters() if n != "stacks.decoder.layers.0.feed_forward.up"
    )
    assert (model.layers[0].feed_forward.up.grad == 1.5).all()


SCENARIOS = (_plain, _padded, _continued, _stopped_by_the_second, _diverging_in_the_second, _uneven, _missing_gradient)


def _process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    with joined(CPU) as ranks:
        for scenario in SCENARIOS:
            try:
                scenario(folder, ranks)
                end = "done"
            except MoesaicError as error:
                end = f"{type(error).__name__} {error}"
            (folder / f"{scenario.__name__}.{rank}").write_text(end)

    with joined(CPU, shard=True) as ranks, suppress(Interrupted):
        run(folder / "sharded", ranks, until=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes did everything."""
    path = tmp_path_factory.mktemp("ranks")
    with pytest.raises(Interrupted):
        run(path / "continued", until=3)
    torch.multiprocessing.spawn(_process, (path,), nprocs=2)
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training by one process, with its checkpoint after 5 steps beside that at the end."""
    path = tmp_path_factory.mktemp("alone")
    run(path)
    with pytest.raises(Interrupted):
        run(path / "five", until=5)
    return path


def ends(folder: Path, scenario: Callable[[Path, Ranks], None]) -> list[str]:
    return [(folder / f"{scenario.__name__}.{rank}").read_text() for rank in (0, 1)]


def assert_same_training(one: Path, other: Path) -> None:
    """Weights and the optimiser's means of gradients, which are sums over all steps, to what floats allow; and the same
    parameters trained in as many steps."""
    (tensors, facts), (expected, expected_facts) = (load_tensors(path / CHECKPOINT) for path in (one, other))
    assert facts == expected_facts
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = float((tensors[name] - tensor).abs().max())
        assert difference <= 2e-5 * float(tensor.abs().max()), name
    counts = {int(count) for name, count in expected.items() if name.startswith("optimizer.step.")}
    assert len(counts) > 1, "every parameter was trained in every step: this shows nothing"


def assert_same_figures(one: Path, other: Path, steps: int) -> None:
    for name in ("loss", "gradient_norm"):
        found, expected = ([r[name] for r in read_metrics(path / "metrics.jsonl")][:steps] for path in (one, other))
        assert len(found) == steps
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_slices_are_of_every_kind() -> None:
    slices = [architecture for step in range(STEPS) for architecture in SLICES(step)]
    parts = [layer.feed_forward for architecture in slices for layer in architecture.decoder.layers]
    assert {len(architecture.decoder.layers) for architecture in slices} == set(SPACE.decoder.depths)
    assert {part.router and part.router.kind for part in parts} >= {None, "top_k"}
    assert len({part.experts for part in parts}) > 1


def test_two_processes_have_the_gradients_of_one(folder: Path, alone: Path) -> None:
    assert ends(folder, _plain) == ["done", "done"]
    assert_same_training(folder / "plain", alone)
    assert_same_figures(folder / "plain", alone, STEPS)


def test_two_processes_with_a_sharded_model_have_the_gradients_of_one(folder: Path, alone: Path) -> None:
    assert_same_training(folder / "sharded", alone / "five")
    assert_same_figures(folder / "sharded", alone, 5)


def test_a_token_has_the_same_weight_in_every_process(folder: Path, tmp_path: Path) -> None:
    assert ends(folder, _padded) == ["done", "done"]
    run(tmp_path, data=TrainData(padded, SLICES))
    assert_same_training(folder / "padded", tmp_path)
    assert_same_figures(folder / "padded", tmp_path, STEPS)


def test_one_two_and_one_process_continue_each_other(folder: Path, alone: Path) -> None:
    assert [end.split()[0] for end in ends(folder, _continued)] == ["Interrupted", "Interrupted"]
    assert load_tensors(folder / "continued" / CHECKPOINT)[1]["step"] == "6"
    run(folder / "continued")
    assert_same_training(folder / "continued", alone)
    assert_same_figures(folder / "continued", alone, STEPS)


def test_all_stop_at_the_same_step_when_one_is_asked_to(folder: Path) -> None:
    first, second = ends(folder, _stopped_by_the_second)
    assert first == second
    assert first.startswith(f"Interrupted stopped at step 3 of {STEPS}")
    assert load_tensors(folder / "stopped" / CHECKPOINT)[1]["step"] == "3"
    assert len(read_metrics(folder / "stopped" / "metrics.jsonl")) == 3


def test_all_fail_when_one_diverges(folder: Path) -> None:
    first, second = ends(folder, _diverging_in_the_second)
    assert first == second
    assert first.startswith("StageFailed training diverged at step 0")
    assert not (folder / "diverged" / CHECKPOINT).exists()


def test_a_batch_that_cannot_be_divided_is_refused(folder: Path) -> None:
    first, second = ends(folder, _uneven)
    assert first == second
    assert first.startswith("MoesaicError train.workers: a batch cannot be dealt evenly")
    assert "2 for 3 rows" in first


def test_a_gradient_missing_in_one_process_counts_as_zero(folder: Path) -> None:
    assert ends(folder, _missing_gradient) == ["done", "done"]


def test_the_processes_have_all_rows_once_with_their_targets_and_masks() -> None:
    whole = padded(3)
    parts = [Ranks(rank, 2).rows(whole) for rank in (0, 1)]
    for rank, part in enumerate(parts):
        for row, name in ((row, name) for row in range(2) for name in ("tokens", "targets", "mask")):
            assert torch.equal(getattr(part, name)[row], getattr(whole, name)[2 * row + rank])
    assert sum(len(part) for part in parts) == len(whole) == 4


def test_one_process_alone_leaves_everything_as_it_is() -> None:
    ranks, model = Ranks(), fresh_model()
    assert ranks.leads
    for name, tensor in ((name, tensor) for name, tensor in vars(padded(1)).items() if tensor is not None):
        assert torch.equal(getattr(ranks.rows(padded(1)), name), tensor)
    assert ranks.rows(batch(0)).mask is None
    assert (ranks.any(False), ranks.any(True), ranks.mean([0.1, 0.2])) == (False, True, [0.1, 0.2])
    ranks.average_gradients(model, [SPACE.largest])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("sharing", ["nested", "packed"])
def test_architectures_determine_which_parameters_get_gradients(preset_space: SearchSpace, sharing) -> None:
    from random import Random

    model = Transformer(preset_space.envelope, VOCABULARY, sharing)
    for seed in range(6):
        model.zero_grad(set_to_none=True)
        slices = [preset_space.sample_balanced(Random(f"{seed}/{n}")) for n in range(1 + seed % 2)]
        for architecture in slices:
            model.run(batch(0).tokens[:1], architecture).logits.square().sum().backward()
        found = {id(parameter) for parameter in used_parameters(model, slices)}
        assert found == {id(parameter) for parameter in model.parameters() if parameter.grad is not None}


def test_gradients_are_reduced_in_buckets_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.supernet import distributed

    tensors = [torch.zeros(size) for size in (3, 1, 9, 2, 2, 2)]
    for elements, sizes in ((4, [[3, 1], [9], [2, 2], [2]]), (100, [[3, 1, 9, 2, 2, 2]])):
        monkeypatch.setattr(distributed, "BUCKET_ELEMENTS", elements)
        assert [[len(t) for t in bucket] for bucket in distributed._buckets(tensors)] == sizes
