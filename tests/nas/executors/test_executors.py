"""Executors give the same losses wherever they evaluate, and a search survives what can go wrong under it."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from moesaic.nas.config import DeviceConfig, ExecutorConfig, LaneResources, SearchConfig
from moesaic.nas.executors import LocalExecutor, cluster, ray_lanes, tune_trials
from moesaic.nas.executors.lane import Lane
from moesaic.nas.executors.local import attempt
from moesaic.nas.executors.ray_lanes import RayExecutor
from moesaic.nas.executors.tune_trials import TuneExecutor
from moesaic.nas.search.budget import find_feasible
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.loop import BudgetSearch, run_search
from moesaic.nas.search.samplers import make_sampler
from moesaic.nas.search.trials import TrialLog, read_trials
from moesaic.nas.tasks.language import next_tokens
from moesaic.search_spaces import MoesaicError, StageFailed
from moesaic.supernet import Judge, Transformer
from tests.contracts.executors import ExecutorContract
from tests.nas.command import interrupt_when, lines_in, moesaic, start
from tests.nas.run_tools import QUICK as SETTINGS
from tests.nas.run_tools import without_stages
from tests.nas.search_tools import budget_of, search, tiny_space

AFTER_SEARCH = ("search", "fidelity", "exports", "retrain", "report")
DEVICE = DeviceConfig(device="cpu", threads=1)
HALF = LaneResources(cpu=0.5)


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    model = Transformer(tiny_space().envelope, 64).eval()
    return Judge(model, next_tokens(torch.randint(0, 64, (8, 17))))


@pytest.fixture
def own_ray():
    """Each test its own Ray, ended whatever happens."""
    yield
    ray.shutdown()


EXECUTORS = {"ray": RayExecutor, "tune": TuneExecutor}
KINDS = pytest.mark.parametrize("kind", EXECUTORS)


def lanes(kind: str, count: int, **changes) -> ExecutorConfig:
    return ExecutorConfig(kind=kind, lanes=count, **{"resources": HALF, **changes})


def make(config: ExecutorConfig, judge: Judge, say=lambda text: None):
    return EXECUTORS[config.kind](config, judge, DEVICE, say)


def run(executor, path: Path, trials: int = 30, should_stop=lambda: False):
    """A search on ``executor``; returns its log's trials."""
    space = tiny_space()
    budget = budget_of(space, flops="60%")
    config = SearchConfig(sampler="evolution", trials=trials, population=8)
    log = TrialLog(path)
    try:
        feasible = FeasibleSampler(space, budget, find_feasible(space, budget))
        one = BudgetSearch("", budget, lambda history: make_sampler(config, feasible, 0, history), log.trials)
        run_search(config, [one], executor, log, should_stop=should_stop)
    finally:
        log.close()
        executor.close()
    return read_trials(path)


def whole(trials, count: int) -> None:
    """Complete, nothing twice, nothing above the budget, the file as the memory."""
    ended = [t for t in trials if t.state in ("evaluated", "failed")]
    assert len(ended) == len({t.architecture for t in ended}) == count
    assert [t.number for t in trials] == list(range(len(trials)))
    assert budget_of(tiny_space(), flops="60%").fits(ended[-1].architecture)
    assert all(budget_of(tiny_space(), flops="60%").fits(t.architecture) for t in ended)
    assert all((t.loss is None) == (t.state == "failed") == (t.reason is not None) for t in ended)


@KINDS
def test_one_lane_searches_exactly_as_this_process_does(kind, own_ray, judge, tmp_path):
    here = run(LocalExecutor(judge), tmp_path / "here.jsonl")
    there = run(make(lanes(kind, 1), judge), tmp_path / "there.jsonl")
    whole(there, 30)
    assert [(t.architecture, t.state, t.values, t.loads) for t in there] == [
        (t.architecture, t.state, t.values, t.loads) for t in here
    ]


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


def test_a_search_in_which_nothing_can_be_evaluated_says_why(tmp_path):
    def evaluate(architecture):
        raise RuntimeError("this kernel needs a GPU")

    space, config = tiny_space(), SearchConfig(trials=100)
    with pytest.raises(StageFailed, match="this kernel needs a GPU"):
        search(space, budget_of(space, flops="60%"), tmp_path / "t.jsonl", config, evaluate)
    assert len(read_trials(tmp_path / "t.jsonl")) < 30


def test_more_lanes_than_processors_and_a_cluster_that_is_not_there(own_ray, judge):
    many = ExecutorConfig(kind="ray", lanes=1000)
    with pytest.raises(MoesaicError, match="1000 lanes need 1000 processors"):
        RayExecutor(many, judge, DEVICE)
    for nowhere in ("127.0.0.1:1", "somewhere", "auto"):
        with pytest.raises(MoesaicError, match="no Ray cluster answers"):
            RayExecutor(ExecutorConfig(kind="ray", address=nowhere), judge, DEVICE)


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


class TestLocal(ExecutorContract):
    def make(self, judge: Judge) -> LocalExecutor:
        return LocalExecutor(judge)


@pytest.mark.usefixtures("own_ray")
class TestRay(ExecutorContract):
    def make(self, judge: Judge) -> RayExecutor:
        return RayExecutor(lanes("ray", 2), judge, DEVICE)


@pytest.mark.usefixtures("own_ray")
class TestTune(ExecutorContract):
    def make(self, judge: Judge) -> TuneExecutor:
        return TuneExecutor(lanes("tune", 2), judge, DEVICE)


TWO_LANES = ("executor.lanes=2", "executor.resources.cpu=0.5")


@KINDS
def test_a_driver_killed_with_all_it_started_continues(kind, quick_run, micro_config, tmp_path):
    """kill -9 of the whole process group, then the last line torn, as by a machine that lost its power."""
    out = without_stages(quick_run, tmp_path / "killed", *AFTER_SEARCH)
    chosen = (*SETTINGS, f"executor.kind={kind}", *TWO_LANES)
    process = start("search", micro_config, *chosen, "--out", out)
    log = out / "search" / "trials.jsonl"
    status, _ = interrupt_when(process, lambda: lines_in(log) >= 5, signal.SIGKILL)
    assert status == -signal.SIGKILL
    with log.open("ab") as file:
        file.write(b'{"number": 99, "state": "evalu')
    before = read_trials(log)
    again = moesaic("search", micro_config, *chosen, "--out", out)
    assert again.returncode == 0, again.stderr
    trials = read_trials(log)
    assert [t.to_json() for t in trials[: len(before)]] == [t.to_json() for t in before]
    ended = [t for t in trials if t.state in ("evaluated", "failed")]
    assert len(ended) == len({t.architecture for t in ended}) == 24


@KINDS
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_drains_and_twice_stops_at_once(times, kind, quick_run, micro_config, tmp_path):
    """As a terminal does it, to the whole process group."""
    out = without_stages(quick_run, tmp_path / "stopped", *AFTER_SEARCH)
    process = start(
        "search", micro_config, *SETTINGS, "search.trials=2000", f"executor.kind={kind}", *TWO_LANES, "--out", out
    )
    log = out / "search" / "trials.jsonl"
    while lines_in(log) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.002)
    _, err = process.communicate(timeout=60)
    assert process.returncode in ((130,) if times == 1 else (130, -signal.SIGINT))
    assert "Traceback" not in err, err
    trials = read_trials(log)
    assert 0 < len(trials) < 2000
    assert not any(t.reason for t in trials)
