"""A search survives what can go wrong in its lanes."""

import itertools
import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from moesaic.nas.config import ExecutorConfig
from moesaic.nas.executors import ray_lanes, tune_trials
from moesaic.nas.executors.lane import Lane
from moesaic.nas.executors.local import attempt
from moesaic.search_spaces import StageFailed
from tests.nas.executors.tools import KINDS, lanes, make, run, whole


class Faulty(Lane):
    """A lane in which the n-th architecture of all lanes goes wrong as ``faults.json`` in the folder FAULTS says.

    A retry succeeds whenever it comes, unless its architecture is doomed.
    """

    def evaluate(self, architecture):
        folder = Path(os.environ["FAULTS"])
        doomed, seen = (folder / f"{what}-{architecture.fingerprint}" for what in ("doomed", "seen"))
        fault = "doom" if doomed.exists() else None
        if not seen.exists():
            seen.touch()
            fault = json.loads((folder / "faults.json").read_text()).get(str(next_number(folder)))
        if fault == "doom":
            doomed.touch()
        if fault in ("kill", "doom"):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            (folder / "hangs").write_text(ray.get_runtime_context().get_node_id())
            time.sleep(1000)
        if fault == "memory":
            return attempt(lambda _: torch.empty(2**60), architecture, self.number)
        outcome = super().evaluate(architecture)
        if fault == "nan":
            return replace(outcome, evaluation=replace(outcome.evaluation, loss=math.nan))
        return outcome


def next_number(folder: Path) -> int:
    """1, 2, 3, ... whichever process asks."""
    for number in itertools.count(1):
        try:
            (folder / f"evaluation-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return number
    raise AssertionError


@pytest.fixture
def faults(own_ray, monkeypatch, tmp_path):
    """A function that plans faults: ``faults({3: "kill"})``; lanes made after it have them."""
    folder = tmp_path / "faults"
    folder.mkdir()
    monkeypatch.setenv("FAULTS", str(folder))
    for module in (ray_lanes, tune_trials):
        monkeypatch.setattr(module, "Lane", Faulty)
    return lambda plan: (folder / "faults.json").write_text(json.dumps({str(n): fault for n, fault in plan.items()}))


@KINDS
def test_a_search_survives_everything_that_happens_in_its_lanes(kind, faults, judge, tmp_path):
    faults({4: "kill", 7: "memory", 10: "nan", 13: "hang", 16: "doom"})
    said: list[str] = []
    trials = run(make(lanes(kind, 2, time_limit=3.0), judge, said.append), tmp_path / "t.jsonl")
    whole(trials, 30)
    reasons = sorted(t.reason for t in trials if t.reason)
    assert len(reasons) == 4
    assert reasons[0].startswith("RuntimeError: ") and "memory" in reasons[0]
    assert reasons[1] == "its lane died 3 times: its worker process has died"
    assert reasons[2:] == ["its loss is nan", "took longer than executor.time_limit of 3 s"]
    assert sum("evaluated again" in line for line in said) == 3  # the killed one, and the doomed one twice
    retried = [t for t in trials if t.attempts == 2 and t.state == "evaluated"]
    assert len(retried) == 1
    assert {t.lane for t in trials if t.state == "evaluated"} == {0, 1}
    for trial in trials:
        if trial.state == "evaluated":
            assert trial.loss == judge(trial.architecture).loss


@KINDS
def test_a_node_may_die(kind, faults, judge, tmp_path):
    """On a cluster of three nodes, of which the last two have a lane each: one of them is killed in mid-evaluation."""
    cluster = Cluster()
    cluster.add_node(num_cpus=0)
    nodes = [cluster.add_node(num_cpus=1, env_vars={"FAULTS": os.environ["FAULTS"]}) for _ in range(2)]
    faults({9: "hang"})
    killed = []

    def kill_when_it_hangs() -> bool:
        file = tmp_path / "faults" / "hangs"  # written once it hangs, by its name
        where = file.read_text() if not killed and file.exists() else ""
        for hanging in [node for node in nodes if node.node_id == where]:
            cluster.remove_node(hanging, allow_graceful=False)
            killed.append(hanging)
        return False

    try:
        config = ExecutorConfig(kind=kind, lanes=2, address=cluster.address, time_limit=100.0)
        trials = run(make(config, judge), tmp_path / "t.jsonl", should_stop=kill_when_it_hangs)
    finally:
        ray.shutdown()
        cluster.shutdown()
    whole(trials, 30)
    assert killed
    assert [t.attempts for t in trials if t.state == "evaluated"].count(2) == 1
    assert not any(t.reason for t in trials)


@KINDS
def test_lanes_that_cannot_start_end_the_search_with_their_reason(kind, own_ray, judge, monkeypatch, tmp_path):
    class Broken(Lane):
        def __init__(self, *arguments):
            raise ModuleNotFoundError("No module named 'something'")

    for module in (ray_lanes, tune_trials):
        monkeypatch.setattr(module, "Lane", Broken)
    with pytest.raises(StageFailed, match=r"could not start[^$]*No module named 'something'"):
        run(make(lanes(kind, 1), judge), tmp_path / "t.jsonl")
