"""A search on lanes continues after its driver is killed, and stops when it is asked to."""

import os
import signal
import time

import pytest

from moesaic.nas.search.trials import read_trials
from tests.nas.command import interrupt_when, lines_in, moesaic_apart, start
from tests.nas.executors.tools import KINDS
from tests.nas.run_tools import QUICK as SETTINGS
from tests.nas.run_tools import without_stages

AFTER_SEARCH = ("search", "fidelity", "exports", "retrain", "report")
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
    again = moesaic_apart("search", micro_config, *chosen, "--out", out)
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
