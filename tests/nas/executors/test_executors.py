"""Executors give the same losses wherever they evaluate, and reach only the Ray that is the user's."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import ray

from moesaic.nas.config import ExecutorConfig, LaneResources, SearchConfig
from moesaic.nas.executors import LocalExecutor, cluster
from moesaic.nas.executors.ray_lanes import RayExecutor
from moesaic.nas.search.trials import read_trials
from moesaic.search_spaces import MoesaicError, StageFailed
from tests.nas.executors.tools import DEVICE, KINDS, lanes, make, run, whole
from tests.nas.search_tools import budget_of, search, tiny_space


@KINDS
def test_one_lane_searches_exactly_as_this_process_does(kind, own_ray, judge, tmp_path):
    here = run(LocalExecutor(judge), tmp_path / "here.jsonl")
    there = run(make(lanes(kind, 1), judge), tmp_path / "there.jsonl")
    whole(there, 30)
    assert [(t.architecture, t.state, t.values, t.loads) for t in there] == [
        (t.architecture, t.state, t.values, t.loads) for t in here
    ]


def test_a_search_in_which_nothing_can_be_evaluated_says_why(tmp_path):
    def evaluate(architecture):
        raise RuntimeError("this kernel needs a GPU")

    space, config = tiny_space(), SearchConfig(trials=100)
    with pytest.raises(StageFailed, match="this kernel needs a GPU"):
        search(space, budget_of(space, flops="60%"), tmp_path / "t.jsonl", config, evaluate)
    assert len(read_trials(tmp_path / "t.jsonl")) < 30


def test_more_lanes_than_processors_and_a_cluster_that_is_not_there(own_ray, judge, monkeypatch):
    many = ExecutorConfig(kind="ray", lanes=1000)
    with pytest.raises(MoesaicError, match="1000 lanes need 1000 processors"):
        RayExecutor(many, judge, DEVICE)
    for nowhere in ("127.0.0.1:1", "somewhere"):
        with pytest.raises(MoesaicError, match="no Ray cluster answers"):
            RayExecutor(ExecutorConfig(kind="ray", address=nowhere), judge, DEVICE)
    # As where "auto" finds the Ray of another run, which listens elsewhere; this machine's may belong to other tests.
    monkeypatch.setattr(cluster, "canonicalize_bootstrap_address_or_die", lambda address: "127.0.0.1:1")
    with pytest.raises(MoesaicError, match="no Ray cluster answers"):
        RayExecutor(ExecutorConfig(kind="ray", address="auto"), judge, DEVICE)


def test_a_cluster_without_room_is_said_once(own_ray, monkeypatch):
    monkeypatch.setattr(cluster, "_PATIENCE", 0.0)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    said: list[str] = []
    missing = cluster.Waiting(ExecutorConfig(kind="tune", lanes=1, resources=LaneResources(cpu=2)), said.append)
    missing.look(lanes_run=True)
    assert not said
    for _ in range(2):
        missing.look(lanes_run=False)
    assert said == [
        "executor: waiting for a node with 2 CPUs and 0 GPUs for a lane; free in the cluster: 1 CPUs, 0 GPUs"
    ]


def test_settings_of_another_executor_are_refused():
    with pytest.raises(ValueError, match="lanes is a setting of the ray and tune executors"):
        ExecutorConfig(lanes=2)
    with pytest.raises(ValueError, match="storage is a setting of the tune executor"):
        ExecutorConfig(kind="ray", storage="s3://bucket")
    with pytest.raises(ValueError, match="loggers need a storage"):
        ExecutorConfig(kind="tune", loggers=["csv"])
    written = ExecutorConfig().model_dump(mode="json")
    assert ExecutorConfig.model_validate(written) == ExecutorConfig()


def nodes_seen_at(address: str, environment: Mapping[str, str]) -> str | None:
    """How many nodes another process sees there; None where Ray refuses to answer."""
    asked = f"from ray._raylet import GcsClient; print(len(GcsClient(address={address!r}).get_all_node_info()))"
    command = [sys.executable, "-c", asked]
    answer = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
    return answer.stdout.strip() if answer.returncode == 0 else None


def test_the_token_of_a_ray_of_ours_is_this_user_s_alone_and_ends_with_it(own_ray):
    before = dict(os.environ)
    with cluster.connected(lanes("ray", 1), DEVICE):
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert token.stat().st_mode & 0o777 == 0o600
        assert len(token.read_text()) == 64
        assert token.parent.stat().st_mode & 0o077 == 0
        here = ray.get_runtime_context().gcs_address
        assert here.rpartition(":")[0] == "127.0.0.1"
        assert nodes_seen_at(here, os.environ) == "1"
        stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        assert nodes_seen_at(here, {**stranger, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}) is None
        assert nodes_seen_at(here, {**stranger, "RAY_AUTH_MODE": "disabled"}) is None
    assert not token.exists()
    assert not [name for name in os.environ if name.startswith("RAY_AUTH") and name not in before]


def test_a_cluster_of_the_user_s_keeps_its_own_token(own_ray, monkeypatch, tmp_path):
    (tmp_path / "mine").write_text("0123456789abcdef0123456789abcdef")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mine"))
    with cluster.connected(lanes("ray", 1), DEVICE):
        assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "mine")
    assert (tmp_path / "mine").exists()
