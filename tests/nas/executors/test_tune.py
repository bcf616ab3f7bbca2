"""What only Ray Tune has: storage, loggers, callbacks, and its use of the lanes."""

from __future__ import annotations

import itertools
import json
import os
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray import tune

from moesaic.nas import executors
from moesaic.nas.config import DeviceConfig, ExecutorConfig, LaneResources
from moesaic.nas.executors import Outcome, evaluate_all, tune_trials
from moesaic.nas.executors.lane import Lane
from moesaic.nas.executors.tune_trials import TuneExecutor, storage_of
from moesaic.nas.stages.run_search import check_executor
from moesaic.search_spaces import Architecture, MoesaicError
from tests.contracts.executors import members
from tests.nas.run_tools import open_run

DEVICE = DeviceConfig(device="cpu", threads=1)


@pytest.fixture(autouse=True)
def own_ray(monkeypatch, tmp_path):
    """A Ray for the test alone, and a home in which nothing may appear."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    yield
    ray.shutdown()
    assert list((tmp_path / "home").iterdir()) == []


def two_lanes(**settings) -> ExecutorConfig:
    return ExecutorConfig(kind="tune", lanes=2, resources=LaneResources(cpu=0.5), **settings)


class Ended(tune.Callback):
    """A callback of the user's."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}

    def on_trial_complete(self, iteration, trials, trial, **info):
        self.losses[trial.config["fingerprint"]] = trial.last_result["loss"]


def test_loggers_and_callbacks_see_every_evaluation(judge, tmp_path):
    seen, architectures = Ended(), members(4)
    config = two_lanes(storage=str(tmp_path / "shared"), loggers=["json", "csv"])
    with closing(TuneExecutor(config, judge, DEVICE, callbacks=[seen])) as executor:
        evaluate_all(executor, architectures)
    expected = {a.fingerprint: judge(a).loss for a in architectures}
    assert seen.losses == expected
    logged = {}
    for path in (tmp_path / "shared").glob("*/*/result.json"):
        settings = json.loads((path.parent / "params.json").read_text())
        logged[settings["fingerprint"]] = json.loads(path.read_text())["loss"]
        assert (path.parent / "progress.csv").exists()
        read = Architecture.from_dict(json.loads(settings["architecture"]), "params.json")
        assert read.fingerprint == settings["fingerprint"]
    assert logged == expected


class SaysWhere(Lane):
    """A lane whose outcomes name its process."""

    def evaluate(self, architecture: Architecture) -> Outcome:
        return replace(super().evaluate(architecture), reason=str(os.getpid()))


class UntilTwoProcesses:
    """Work that ends once two processes have evaluated, or after 600 evaluations."""

    def __init__(self) -> None:
        self.left = itertools.islice(itertools.cycle(members(8)), 600)
        self.processes: set[str | None] = set()

    def ask(self) -> Architecture | None:
        return next(self.left, None) if len(self.processes) < 2 else None

    def tell(self, outcome: Outcome) -> None:
        self.processes.add(outcome.reason)


def test_all_lanes_come_to_work_although_evaluations_are_shorter_than_their_start(judge, monkeypatch):
    monkeypatch.setattr(tune_trials, "Lane", SaysWhere)
    work = UntilTwoProcesses()
    with closing(TuneExecutor(two_lanes(), judge, DEVICE)) as executor:
        temporary = Path(executor._storage)
        executor.run(work)
        assert temporary.exists()
    assert len(work.processes) == 2
    assert not temporary.exists()


def test_a_storage_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for storage in (str(tmp_path / "file" / "folder"), "nowhere://bucket/folder"):
        with pytest.raises(MoesaicError, match="cannot be made") as caught:
            storage_of(two_lanes(storage=storage))
        assert caught.value.where == "executor.storage"
        assert storage in str(caught.value.found)


@pytest.mark.parametrize(("kind", "module", "extra"), [("tune", "pyarrow.fs", "tune"), ("ray", "ray", "cluster")])
def test_a_missing_extra_is_said_before_anything_trains(kind, module, extra, micro_config, tmp_path, monkeypatch):
    for name in ("tune_trials", "ray_lanes", "cluster"):
        monkeypatch.delitem(sys.modules, f"moesaic.nas.executors.{name}", raising=False)
        monkeypatch.delattr(executors, name, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MoesaicError, match="is not installed") as caught:
        check_executor(open_run(micro_config, tmp_path / "run", f"executor.kind={kind}"))
    assert caught.value.nearest == f"pip install 'moesaic[{extra}]'"
