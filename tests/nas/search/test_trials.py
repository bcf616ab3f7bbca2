import os
from pathlib import Path

import pytest

from moesaic.nas.config import SearchConfig
from moesaic.nas.search.trials import Trial, TrialLog, read_trials
from moesaic.search_spaces import MoesaicError
from tests.nas.search_tools import budget_of, search, tiny_space


@pytest.fixture
def log(tmp_path) -> Path:
    space = tiny_space()
    config = SearchConfig(sampler="nsga2", trials=12, population=4)
    search(space, budget_of(space, flops="40%"), tmp_path / "trials.jsonl", config)
    return tmp_path / "trials.jsonl"


def test_a_trial_survives_its_line(log):
    for trial in read_trials(log):
        again = Trial.from_json(trial.to_json(), "test")
        assert again.to_json() == trial.to_json()
        assert again.architecture == trial.architecture


def test_every_cut_of_the_log_loses_at_most_the_trial_it_hits(log, tmp_path):
    whole, data = read_trials(log), log.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    finished = {end: n for n, (end, t) in enumerate(zip(ends, whole, strict=True), 1) if t.state == "evaluated"}
    for cut in range(0, len(data), 401):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(data[:cut])
        expected = max([n for end, n in finished.items() if end <= cut], default=0)
        opened = TrialLog(path)
        assert len(opened.trials) == expected
        opened.append(whole[expected:])
        opened.close()
        assert path.read_bytes() == data


def test_a_line_changed_by_hand_is_refused(log):
    text = log.read_text()
    log.write_text(text.replace('"width":32', '"width":48', 1))
    with pytest.raises(MoesaicError, match="disagree") as caught:
        read_trials(log)
    assert ":1" in str(caught.value.where) or "trials.jsonl:" in str(caught.value.where)


def test_a_foreign_line_is_refused_with_its_number(log):
    log.write_text(log.read_text() + '{"hello": 1}\n')
    with pytest.raises(MoesaicError, match="not a trial") as caught:
        read_trials(log)
    assert str(caught.value.where).endswith(f":{len(log.read_text().splitlines())}")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_full_disk_is_one_message(log):
    trials = read_trials(log)
    full = TrialLog.__new__(TrialLog)
    full.path, full.trials = log, []
    always_full = Path("/dev/full")
    full._file = always_full.open("ab", buffering=0)
    with pytest.raises(MoesaicError, match="No space left"):
        full.append(trials[:1])
    assert full.trials == []
    full.close()
