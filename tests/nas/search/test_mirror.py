"""The mirror of the log in an Optuna study: complete, rebuilt when damaged, never another's, never waited for."""

import errno
import os
import threading
import time
from functools import partial

import optuna
import pytest

from moesaic.nas.config import SearchConfig
from moesaic.nas.search import mirror as module
from moesaic.nas.search.mirror import Mirror, check_database, database, journal
from moesaic.nas.search.samplers.genome import Genome
from moesaic.search_spaces import Interrupted, MoesaicError
from tests.nas.search_tools import budget_of, search, tiny_space

OBJECTIVES = ["loss", "flops"]


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    space = tiny_space()
    config = SearchConfig(sampler="nsga2", trials=12, population=8, objectives=list(OBJECTIVES))
    return search(space, budget_of(space, flops="45%"), tmp_path_factory.mktemp("log") / "t.jsonl", config)


@pytest.fixture(params=["journal", "database"])
def storage(request, tmp_path):
    if request.param == "journal":
        return partial(journal, tmp_path / "journal.log")
    return partial(database, f"sqlite:///{tmp_path}/t.db")


def mirror_of(storage, trials, say=pytest.fail, should_stop=lambda: False):
    return Mirror(storage, "study", OBJECTIVES, Genome(tiny_space()), trials, say, should_stop)


def study_of(storage, name="study"):
    return optuna.load_study(study_name=name, storage=storage())


def assert_mirrors(storage, log, name="study"):
    study = study_of(storage, name)
    assert [t.user_attrs["fingerprint"] for t in study.trials] == [t.architecture.fingerprint for t in log]
    assert [tuple(t.values) for t in study.trials if t.values] == [t.values for t in log if t.values]
    assert study.metric_names == OBJECTIVES


def test_it_has_every_trial_and_is_made_again_when_it_differs(storage, trials, tmp_path):
    with mirror_of(storage, trials[:5]) as mirror:
        mirror.append(trials[5:9])
    assert_mirrors(storage, trials[:9])
    (tmp_path / "journal.log.lock").write_text("left by a killed process")
    for log in (trials, trials[:7], trials[::-1]):
        with mirror_of(storage, log):
            pass
        assert_mirrors(storage, log)


def test_a_journal_torn_at_any_byte_is_made_again(trials, tmp_path):
    storage = partial(journal, tmp_path / "journal.log")
    with mirror_of(storage, trials[:2]):
        pass
    data = (tmp_path / "journal.log").read_bytes()
    for cut in (*range(0, len(data), 97), len(data) - 1):
        (tmp_path / "journal.log").write_bytes(data[:cut])
        with mirror_of(storage, trials[:2]) as mirror:
            mirror.append(trials[2:3])
        assert_mirrors(storage, trials[:3])


@pytest.mark.parametrize("content", [b"hello\n", b'{"op_code": 4}\n', b"[]\n", b"\xff\xfe\n", b"\0" * 9])
def test_a_file_that_is_no_journal_is_made_one(content, trials, tmp_path):
    (tmp_path / "journal.log").write_bytes(content)
    storage = partial(journal, tmp_path / "journal.log")
    with mirror_of(storage, trials):
        pass
    assert_mirrors(storage, trials)


def test_a_study_of_the_same_name_that_is_anothers_stays(storage, trials):
    other = optuna.create_study(storage=storage(), study_name="study")
    other.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    for count in (4, 9):
        with mirror_of(storage, trials[:count]):
            pass
        assert_mirrors(storage, trials[:count], "study-2")
    assert [trial.params for trial in study_of(storage).trials] == [trial.params for trial in other.trials]


def test_a_study_that_is_deleted_while_the_search_runs_is_told_and_comes_back(storage, trials):
    said: list[str] = []
    with mirror_of(storage, trials[:3], said.append) as mirror:
        wait_for(lambda: mirror._answers == 3)
        optuna.delete_study(study_name="study", storage=storage())
        mirror.append(trials[3:])
    assert len(said) == 1 and "trials.jsonl continues" in said[0]
    with mirror_of(storage, trials):
        pass
    assert_mirrors(storage, trials)


def test_a_storage_that_fails_is_told_once_and_the_next_opening_makes_up_for_it(storage, trials, monkeypatch):
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "add_trial", _full_disk)
        with mirror_of(storage, trials[:5], said.append) as mirror:
            for trial in trials[5:]:
                mirror.append([trial])
    assert len(said) == 1
    assert "No space left" in said[0]
    with mirror_of(storage, trials):
        pass
    assert_mirrors(storage, trials)


def _full_disk(study, trial):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Silent:
    """A storage that never answers, until the test ends."""

    def __init__(self):
        self.asked, self.end = threading.Event(), threading.Event()

    def __call__(self):
        self.asked.set()
        self.end.wait(60)
        raise OSError("gone")


@pytest.fixture
def silent():
    storage = Silent()
    yield storage
    storage.end.set()


def test_a_storage_that_never_answers_ends_neither_the_search_nor_the_wait(silent, trials, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.2)
    said: list[str] = []
    with mirror_of(silent, trials[:3], said.append) as mirror:
        mirror.append(trials[3:])
        assert silent.asked.wait(30)
    assert said == ["search: the study for optuna-dashboard stops here (its storage does not answer); "
                    "trials.jsonl continues"]  # fmt: skip


def test_ctrl_c_ends_the_wait_for_a_storage(silent, trials, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 1e6)
    monkeypatch.setattr(module, "_LAST_SECONDS", 0.1)
    with mirror_of(silent, trials, should_stop=silent.asked.is_set):
        pass
    with pytest.raises(Interrupted), mirror_of(silent, trials):
        raise Interrupted("stopped")


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/t.db", "postgresql://user@localhost:1/name"])
def test_a_database_that_does_not_open_is_one_message(url):
    with pytest.raises(MoesaicError, match="mirror: cannot open the database"):
        check_database(url)


def test_a_file_that_is_no_database_is_one_message(tmp_path):
    (tmp_path / "t.db").write_text("my notes, not a database, and long enough to be read as one" * 20)
    with pytest.raises(MoesaicError, match="cannot open the database"):
        check_database(f"sqlite:///{tmp_path}/t.db")
    assert (tmp_path / "t.db").read_text().startswith("my notes")


def test_a_database_that_does_not_answer_is_one_message_and_looks_at_ctrl_c(monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(module, "database", lambda url: gate.wait(60))
    with pytest.raises(MoesaicError, match=r"no answer within 0.1 s"):
        check_database("postgresql://user@host/name", seconds=0.1)
    with pytest.raises(Interrupted):
        check_database("postgresql://user@host/name", lambda: True, seconds=1e6)
    gate.set()


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
