"""Trainings by two processes: the result of one, and what becomes of it when workers die, stop or fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moesaic.nas.config import RetrainConfig, TrainConfig, load_config, load_retrain_file
from moesaic.nas.device import Device
from moesaic.nas.training.elastic import WorkersLost
from moesaic.nas.training.link import Link
from moesaic.nas.training.recipe import Recipe, single_recipe, supernet_recipe
from moesaic.nas.training.trainer import Trainer
from moesaic.search_spaces import Interrupted, MoesaicError, StageFailed
from moesaic.supernet import Transformer, slice_of
from moesaic.supernet.checkpoint import load_tensors
from moesaic.supernet.metrics import read_metrics
from tests.listeners import is_loopback, listening
from tests.nas.command import interrupt_when, lines_in, start
from tests.nas.run_tools import do_stage, open_run, said

STEPS = 120
TRAINING = (f"supernet.steps={STEPS}", "supernet.checkpoint_every=20", "supernet.balance_weight=0.0")
TWO = (*TRAINING, "train.workers=2")


@pytest.fixture(scope="module")
def unbroken(micro_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage supernet by two workers that nothing disturbed."""
    path = tmp_path_factory.mktemp("workers") / "unbroken"
    run = open_run(micro_config, path, *TWO)
    do_stage(run, "supernet")
    assert "lost" not in said(run)
    return path / "supernet"


def workers_of(parent: int) -> dict[int, int]:
    """Process numbers of its workers by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                variables = dict(v.partition("=")[::2] for v in (folder / "environ").read_text().split("\0"))
                if "RANK" in variables:
                    found[int(variables["RANK"])] = int(folder.name)
        except (OSError, ValueError):  # it ended as we looked
            pass
    return found


def once_it_trains(folder: Path, act: Callable[[], bool]) -> Callable[[], bool]:
    """A ``should_stop`` that acts when 20 steps are done, and then says what ``act`` did."""
    done: list[bool] = []

    def should_stop() -> bool:
        if not done and lines_in(folder / "metrics.jsonl") >= 3:
            done.append(act())
        return any(done)

    return should_stop


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def assert_same_end(folder: Path, expected: Path) -> None:
    mine, other = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert losses(folder) == losses(expected)


# ---------------------------------------------------------------- results


def test_two_workers_train_as_one_does(unbroken: Path, micro_config: Path, tmp_path: Path) -> None:
    run = open_run(micro_config, tmp_path / "one", *TRAINING)
    do_stage(run, "supernet")
    assert losses(unbroken) == pytest.approx(losses(tmp_path / "one" / "supernet"), rel=2e-3)
    assert losses(unbroken)[0] == pytest.approx(losses(tmp_path / "one" / "supernet")[0], rel=1e-6)
    assert {p.name for p in unbroken.iterdir()} == {p.name for p in (tmp_path / "one" / "supernet").iterdir()}
    assert open_run(micro_config, tmp_path / "one", *TWO).folder("supernet").complete  # however many trained it


def test_a_model_is_retrained_from_inherited_weights(unbroken: Path, micro_config: Path, tmp_path: Path) -> None:
    run = open_run(micro_config, unbroken.parent, *TWO)
    architecture = run.space.smallest
    config = RetrainConfig(steps=4, batch_size=4, balance_weight=0.0, evaluation_windows=4)
    recipe = single_recipe(architecture, config, 0, run.device.bfloat16)
    losses = [
        run.judge("test", 4, model)(architecture).loss
        for count in (1, 2)
        for trainer in (Trainer(run.task, run.device, TrainConfig(workers=count)),)
        for model in (trainer.finish(recipe, tmp_path / str(count), "it", weights=slice_of(run.supernet)),)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] != pytest.approx(run.judge("test", 4)(architecture).loss, rel=1e-5)
    assert {path.name for path in (tmp_path / "2").iterdir()} == {"model.safetensors", "metrics.jsonl", "tensorboard"}


# ---------------------------------------------------------------- ends of every kind


def test_a_killed_worker_is_started_again_and_nothing_is_lost(unbroken, micro_config, tmp_path) -> None:
    def kill() -> bool:
        os.kill(workers_of(os.getpid())[0], signal.SIGKILL)
        return False

    should_stop = once_it_trains(tmp_path / "supernet", kill)
    run = open_run(micro_config, tmp_path, *TWO, should_stop=should_stop)
    do_stage(run, "supernet")
    assert "a worker was lost; all continue from step" in said(run)
    assert_same_end(tmp_path / "supernet", unbroken)
    assert not (tmp_path / "supernet" / "workers").exists()


def test_a_stopped_training_is_continued_by_torchrun(unbroken, micro_config, tmp_path) -> None:
    folder = tmp_path / "supernet"
    run = open_run(micro_config, tmp_path, *TWO, should_stop=once_it_trains(folder, lambda: True))
    with pytest.raises(Interrupted, match=f"of {STEPS}; the same command continues"):
        do_stage(run, "supernet")
    step = int(load_tensors(folder / "checkpoint.safetensors")[1]["step"])
    assert 20 < step < STEPS
    assert workers_of(os.getpid()) == {}
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "moesaic.nas.training.worker",
    ]
    env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    subprocess.run([sys.executable, *command, str(folder / "training.json")], env=env, check=True, capture_output=True)
    assert load_tensors(folder / "checkpoint.safetensors")[1]["step"] == str(STEPS)
    do_stage(open_run(micro_config, tmp_path, *TRAINING), "supernet")
    assert_same_end(folder, unbroken)


def test_a_training_that_diverges_is_told_as_ever(micro_config, tmp_path) -> None:
    run = open_run(micro_config, tmp_path, *TWO, "supernet.learning_rate=1e+30", "supernet.warmup_steps=0")
    with pytest.raises(StageFailed, match="training diverged at step") as caught:
        do_stage(run, "supernet")
    assert caught.value.allowed == "a lower learning_rate or a longer warm-up"
    assert str(tmp_path / "supernet" / "checkpoint.safetensors") in caught.value.problem


def test_workers_that_die_too_often_are_told_with_the_cause(micro_config, tmp_path) -> None:
    folder = tmp_path / "supernet"

    def kill() -> bool:
        os.kill(workers_of(os.getpid())[1], signal.SIGKILL)
        return False

    run = open_run(micro_config, tmp_path, *TWO, "train.restarts=0", should_stop=once_it_trains(folder, kill))
    with pytest.raises(WorkersLost, match=r"worker 1 ended, after 0 restarts: Signal 9 \(SIGKILL\)") as caught:
        do_stage(run, "supernet")
    assert (caught.value.exit_code, caught.value.where) == (1, str(folder / "workers"))
    # The other worker may be ended before it has written that its connection is gone.
    assert {path.parent.name for path in (folder / "workers").rglob("stderr.log")} == {"0", "1"}


def test_workers_end_with_the_program_that_watches_them(micro_config, tmp_path) -> None:
    folder = tmp_path / "supernet"
    process = start("supernet", micro_config, "--out", tmp_path, *TWO, "supernet.steps=100000")
    status, err = interrupt_when(process, lambda: lines_in(folder / "metrics.jsonl") > 0, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert "Traceback" not in err
    deadline = time.monotonic() + 60
    while any(str(folder) in text for text in _command_lines()):
        assert time.monotonic() < deadline, "workers outlive it"
        time.sleep(0.1)


def _command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended as we looked
            yield path.read_text()


def test_nobody_outside_this_machine_can_reach_a_training(micro_config, tmp_path) -> None:
    """Every listener of two workers, of their agent and of the program that watches them is on loopback."""
    seen: set[tuple[str, int]] = set()

    def look() -> bool:
        seen.update(listening(os.getpid()))
        return True

    run = open_run(micro_config, tmp_path, *TWO, should_stop=once_it_trains(tmp_path / "supernet", look))
    with pytest.raises(Interrupted):
        do_stage(run, "supernet")
    assert len(seen) >= 4  # the link, the workers' store, and each worker's
    assert {address for address, _ in seen if not is_loopback(address)} == set()


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(("workers", "nearest"), [(3, 2), (7, 4), (100, 4)])
def test_workers_that_no_batch_can_be_dealt_to_are_refused(micro_config, workers: int, nearest: int) -> None:
    with pytest.raises(MoesaicError, match="must divide the batch size") as caught:
        load_config(micro_config, [f"train.workers={workers}", "retrain.batch_size=8"])
    assert caught.value.where == "command line: train.workers"
    assert (caught.value.found, caught.value.nearest) == (workers, nearest)
    assert str(caught.value.allowed).endswith("batch_size: 1, 2, 4")


def test_an_export_can_be_trained_by_workers_too(tmp_path: Path) -> None:
    (tmp_path / "retrain.yaml").write_text("name: x\ndata: {}\nretrain: {batch_size: 6}\n")
    assert load_retrain_file(tmp_path / "retrain.yaml", ["train.workers=3"]).train.workers == 3
    with pytest.raises(MoesaicError, match="must divide the batch size"):
        load_retrain_file(tmp_path / "retrain.yaml", ["train.workers=4"])


def test_one_worker_has_nothing_to_share_a_model_with(micro_config: Path) -> None:
    with pytest.raises(MoesaicError, match="at least two workers"):
        load_config(micro_config, ["train.shard=true"])


def test_more_workers_than_gpus_are_refused(micro_config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    run = open_run(micro_config, tmp_path, *TWO)
    run.__dict__["device"] = Device("cuda", "a GPU", "float32", 1, "0")
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, *_: model)
    with pytest.raises(MoesaicError, match="GPU of its own") as caught:
        do_stage(run, "supernet")
    assert (caught.value.found, caught.value.nearest) == (2, 1)


def test_a_recipe_survives_its_journey_to_a_worker(micro_config: Path, tmp_path: Path) -> None:
    run = open_run(micro_config, tmp_path, "supernet.sharing=packed")
    recipe = supernet_recipe(run.config, run.space, bfloat16=False)
    received = Recipe.of(json.loads(json.dumps(recipe.plain())))
    assert received == recipe
    model = received.weights(run.task)(received.architecture)
    assert (model.architecture, model.sharing) == (run.space.envelope, "packed")
    assert received.settings.steps == run.config.supernet.steps
    data, expected = received.data(run.task), recipe.data(run.task)
    for step in (0, 5):
        assert torch.equal(data.batch(step).tokens, run.task.batch(4, 0, step).tokens)
        assert data.slices(step) == expected.slices(step)
    architecture, config = run.space.smallest, RetrainConfig(steps=7, batch_size=2)
    received = Recipe.of(json.loads(json.dumps(single_recipe(architecture, config, 3, bfloat16=True).plain())))
    assert (received.architecture, received.settings.steps, received.settings.bfloat16) == (architecture, 7, True)
    assert received.data(run.task).slices(4) == [architecture]
    model = received.weights(run.task)(received.architecture)
    torch.manual_seed(3)
    alike = Transformer(architecture, run.task.vocab_size)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alike.parameters(), strict=True))
    assert torch.equal(received.data(run.task).batch(1).tokens, run.task.batch(2, 3, 1).tokens)


# ---------------------------------------------------------------- link


def test_both_ends_of_a_link_hear_of_each_other() -> None:
    here = Link.serve()
    there = Link.connect(here.address)
    assert (here.news(), here.error(), there.stop_asked()) == (None, None, False)
    there.tell({"step": 1})
    there.tell({"step": 2, "record": {"loss": 1.5}})
    here.ask_to_stop()
    deadline = time.monotonic() + 30
    while not there.stop_asked() or here.news() != {"step": 2, "record": {"loss": 1.5}}:
        assert time.monotonic() < deadline
    there.fail(StageFailed("diverged", where="a file", found=3))
    error = here.error()
    assert type(error) is StageFailed
    assert str(error) == str(StageFailed("diverged", where="a file", found=3))
    del here
    with pytest.raises(RuntimeError):
        there.stop_asked()
