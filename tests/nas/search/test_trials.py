"""The trial log: what is in it survives a kill or a full disk at any byte, and damage is told with its line."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from moesaic.nas.config import SearchConfig
from moesaic.nas.search.trials import Trial, TrialLog, first_trials, read_trials
from moesaic.search_spaces import Damaged, MoesaicError
from tests.nas.search_tools import budget_of, search, tiny_space


@pytest.fixture
def log(tmp_path) -> Path:
    space = tiny_space()
    config = SearchConfig(sampler="nsga2", trials=12, population=4)
    search(space, budget_of(space, flops="40%"), tmp_path / "trials.jsonl", config)
    return tmp_path / "trials.jsonl"


def groups_of(trials: list[Trial]) -> list[list[Trial]]:
    """Every evaluated trial with the refusals before it: what one append writes."""
    groups: list[list[Trial]] = [[]]
    for trial in trials:
        groups[-1].append(trial)
        if trial.ended:
            groups.append([])
    return groups[:-1]


def joined(groups: list[list[Trial]]) -> list[Trial]:
    return [trial for group in groups for trial in group]


def text_of(trials: list[Trial]) -> bytes:
    return "".join(trial.to_json() + "\n" for trial in trials).encode()


class FillingDisk:
    """``os.write`` on a disk with ``room`` bytes left, which fails in the middle of a write, as disks do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.room, self._write = 0, os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, handle: int, data) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(handle, bytes(data)[: self.room])
        self.room -= written
        return written


def test_a_trial_survives_its_line(log):
    for trial in read_trials(log):
        again = Trial.from_json(trial.to_json(), "test")
        assert again.to_json() == trial.to_json()
        assert again.architecture == trial.architecture


def test_a_log_cut_at_any_byte_loses_at_most_the_trial_it_hits(log, tmp_path):
    whole = read_trials(log)[:3]
    groups, data = groups_of(whole), text_of(whole)
    sizes = [len(text_of(joined(groups[:count]))) for count in range(len(groups) + 1)]
    path = tmp_path / "cut.jsonl"
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        done = max(count for count, size in enumerate(sizes) if size <= cut)
        assert len(read_trials(path)) == len(joined(groups[:done]))
        if cut % 37 == 0:
            TrialLog(path).close()
            assert path.read_bytes() == data[: sizes[done]]
    opened = TrialLog(path)
    opened.append(whole[len(opened.trials) :])
    opened.close()
    assert path.read_bytes() == data


def test_a_disk_that_fills_up_at_any_byte_of_any_write_leaves_a_log_that_continues(log, tmp_path, monkeypatch):
    groups = groups_of(read_trials(log)[:3])
    disk = FillingDisk(monkeypatch)
    for group in range(len(groups)):
        before = joined(groups[:group])
        for room in range(len(text_of(groups[group]))):
            path = tmp_path / "full.jsonl"
            path.write_bytes(text_of(before))
            opened, disk.room = TrialLog(path), room
            with pytest.raises(MoesaicError, match="No space left"):
                opened.append(groups[group])
            assert opened.trials == before
            opened.close()
            assert path.read_bytes() == text_of(before)
    opened, disk.room = TrialLog(path), 1 << 20
    opened.append(groups[-1])
    opened.close()
    assert path.read_bytes() == text_of(joined(groups))


def test_a_disk_that_cannot_even_take_the_rest_back_leaves_a_readable_log(log, tmp_path, monkeypatch):
    trials = read_trials(log)
    path = tmp_path / "full.jsonl"
    opened = TrialLog(path)
    opened.append(trials[:3])
    size = path.stat().st_size
    FillingDisk(monkeypatch).room = 40
    monkeypatch.setattr(os, "ftruncate", lambda handle, size: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(MoesaicError, match="No space left"):
        opened.append(trials[3:6])
    opened.close()
    monkeypatch.undo()
    assert path.stat().st_size == size + 40
    assert len(read_trials(path)) == len(joined(groups_of(trials[:3])))


def test_fewer_evaluations_are_the_first_of_each_budget(log):
    groups = groups_of(read_trials(log))
    named = [[Trial(**{**vars(t), "budget": "ab"[n % 3 == 0]}) for t in group] for n, group in enumerate(groups)]
    kept = first_trials(joined(named), 3)
    assert [t.number for t in kept if t.ended and t.budget == "b"] == [named[n][-1].number for n in (0, 3, 6)]
    assert [t.number for t in kept if t.ended and t.budget == "a"] == [named[n][-1].number for n in (1, 2, 4)]
    assert first_trials(kept, 100) == kept


DAMAGE = {
    "a foreign line": ("not a trial", lambda d: {"hello": 1}),
    "its number": ("not in its place", lambda d: d | {"number": 7}),
    "its state": ("not a trial", lambda d: d | {"state": "fine"}),
    "an excess that is no number": ("not a trial", lambda d: d | {"excess": {"flops": "0.1"}}),
    "an excess over nothing known": ("not a trial", lambda d: d | {"excess": {"flop": 0.1}}),
    "a cost that is infinite": ("not a trial", lambda d: d | {"costs": d["costs"] | {"flops": float("inf")}}),
    "a loss that is not a number": ("not a trial", lambda d: d | {"state": "evaluated", "loss": float("nan")}),
    "costs that are a list": ("not a trial", lambda d: d | {"costs": [1]}),
    "a list": ("not a trial", lambda d: [d]),
    "its fingerprint": ("disagree", lambda d: d | {"fingerprint": "0" * len(d["fingerprint"])}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_line_is_told_with_its_place_and_a_command_that_mends_the_log(log, name):
    problem, damage = DAMAGE[name]
    lines = log.read_text().splitlines()
    lines[3] = json.dumps(damage(json.loads(lines[3])))
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(Damaged, match=problem) as caught:
        read_trials(log)
    assert caught.value.where == f"{log}:4"
    subprocess.run(caught.value.nearest, shell=True, check=True)
    assert len(read_trials(log)) <= 3
    assert Path(f"{log}.damaged").read_text() == "\n".join(lines) + "\n"


def test_an_architecture_that_is_evaluated_twice_is_told(log):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    first = next(line for line in lines if line["state"] == "evaluated")
    lines[-1] = first | {"number": lines[-1]["number"]}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(Damaged, match=r"evaluates the architecture of line \d+ again") as caught:
        read_trials(log)
    assert caught.value.line == len(lines)


def test_bytes_that_are_not_text_are_told(log):
    log.write_bytes(log.read_bytes() + b"\xff\x00\n")
    with pytest.raises(Damaged, match="not a trial"):
        read_trials(log)
