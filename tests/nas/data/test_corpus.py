import json
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from moesaic.nas.data import load_corpus, open_corpus
from moesaic.nas.data.cache import cache_directory, make_folder
from moesaic.nas.data.streams import StreamFacts, checked
from moesaic.nas.data.tokenizer import END_OF_TEXT
from moesaic.search_spaces import MoesaicError
from tests.nas.data.data_tools import config, lines, texts_of, write


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of this test."""
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_streams_hold_the_text_and_bits_per_byte_counts_its_bytes(corpus_folder):
    corpus = load_corpus(config(corpus_folder), "test")
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_path))
    texts = texts_of(corpus_folder)["validation"]
    stream = corpus.splits["validation"]
    assert tokenizer.decode(list(map(int, stream.tokens)), skip_special_tokens=True) == "".join(texts)
    assert stream.text_bytes == sum(len(text.encode()) for text in texts)
    uniform = math.log(corpus.vocab_size)
    expected = len(stream.tokens) * math.log2(corpus.vocab_size) / stream.text_bytes
    assert corpus.bits_per_byte("validation", uniform) == pytest.approx(expected)


def test_streams_are_memory_mapped_and_made_once(corpus_folder, cache):
    said: list[str] = []
    first = load_corpus(config(corpus_folder), "test", said.append)
    assert any("tokenizer" in text for text in said)
    said.clear()
    second = load_corpus(config(corpus_folder), "test", said.append)
    assert said == ["reading files", said[1]]
    assert said[1].startswith("24 text files")
    assert isinstance(second.splits["train"].tokens, np.memmap)
    assert first.fingerprint == second.fingerprint


def test_a_large_vocabulary_takes_wide_tokens(tmp_path, cache):
    words = [END_OF_TEXT, *pre_tokenizers.ByteLevel.alphabet(), *(f"word {number}" for number in range(1 << 16))]
    large = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    large.save(str(tmp_path / "large.json"))
    folder = write(tmp_path / "corpus", {"a": lines("a", 200)})
    corpus = load_corpus(config(folder), "test", tokenizer=tmp_path / "large.json")
    assert corpus.splits["train"].tokens.dtype == np.uint32
    path = corpus.tokenizer_path.parent / "train.tokens"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MoesaicError, match=r"train.tokens: was cut"):
        open_corpus(path.parent, 16, "test")


def test_batches_are_a_function_of_seed_and_step(corpus_folder):
    corpus = load_corpus(config(corpus_folder), "test")
    assert corpus.batch("train", 4, 1, 2).equal(corpus.batch("train", 4, 1, 2))
    assert not corpus.batch("train", 4, 1, 2).equal(corpus.batch("train", 4, 1, 3))
    assert corpus.batch("train", 4, 1, 2).shape == (4, 17)


def test_windows_do_not_overlap(corpus_folder):
    corpus = load_corpus(config(corpus_folder), "test")
    stream = corpus.splits["test"].tokens
    windows = corpus.windows("test", 10**9)
    assert len(windows) == len(stream) // 17
    starts = np.linspace(0, len(stream) - 17, len(windows)).astype(int)
    assert np.diff(starts).min() >= 17


def test_a_split_of_one_window_is_halved(tmp_path, cache):
    """An error over windows needs two of them."""
    text = {"train.txt": lines("much to learn", 100), "valid.txt": "some words to judge by", "test.txt": "a few words"}
    folder = write(tmp_path / "corpus", text)
    said: list[str] = []
    corpus = load_corpus(config(folder, sequence_length=8), "test", said.append)
    stream = corpus.splits["test"].tokens
    assert 9 <= len(stream) < 18
    half = len(stream) // 2
    assert corpus.windows("test", 8).tolist() == [stream[:half].tolist(), stream[-half:].tolist()]
    assert f"the test split is shorter than two contexts: models are compared on two of {half - 1} tokens" in said


@pytest.mark.parametrize("text", ["", "tiny"])
def test_too_little_text_is_refused(tmp_path, text):
    with pytest.raises(MoesaicError, match=r"empty|shorter than the context|too little text"):
        load_corpus(config(write(tmp_path, {"a": text})), "run.yaml:3: data.files")


def test_a_changed_text_is_another_corpus_and_a_moved_one_is_not(tmp_path):
    write(tmp_path, {"a/one.txt": lines("some words", 400), "b/two.txt": lines("some words", 400)})
    before = load_corpus(config(tmp_path / "a"), "test").fingerprint
    assert load_corpus(config(tmp_path / "b"), "test").fingerprint == before
    write(tmp_path, {"a/one.txt": lines("other words", 400)})
    assert load_corpus(config(tmp_path / "a"), "test").fingerprint != before


def test_the_same_text_divided_otherwise_is_another_corpus(tmp_path):
    write(tmp_path, {name: lines(name, 200) for name in ("x", "y", "z")})
    x, y, z = (str(tmp_path / name) for name in "xyz")
    given = [[x, y, z], {"train": [x, y], "test": z}, {"train": [x, z], "test": y}, {"train": x, "test": [y, z]}]
    assert len({load_corpus(config(files), "test").fingerprint for files in given}) == 4


def test_a_given_tokenizer_is_used(corpus_folder, tmp_path):
    corpus = load_corpus(config(corpus_folder), "test")
    other = write(tmp_path, {"other/o.txt": lines("other", 400), "bad.json": "{", "none.json": "{}"}) / "other"
    with_given = load_corpus(config(other), "test", tokenizer=corpus.tokenizer_path)
    assert with_given.vocab_size == corpus.vocab_size
    assert with_given.tokenizer_path.read_text() == corpus.tokenizer_path.read_text()
    for name in ("bad.json", "none.json", "missing.json"):
        with pytest.raises(MoesaicError, match="is not a tokenizer"):
            load_corpus(config(other), "test", tokenizer=tmp_path / name)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4] = bytes(4)  # as a crash leaves a block that was never written
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, cut, change, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["train.tokens", "test.tokens", "tokenizer.json", "corpus.json"])
def test_a_damaged_cache_is_named_and_made_again(corpus_folder, cache, name, damage):
    corpus = load_corpus(config(corpus_folder), "test")
    folder = corpus.tokenizer_path.parent
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    with pytest.raises(MoesaicError, match=name):
        open_corpus(folder, 16, "test")
    said: list[str] = []
    load_corpus(config(corpus_folder), "test", said.append)
    assert any(text.startswith("the cached corpus is damaged and is made again") and name in text for text in said)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    assert list(folder.parent.iterdir()) == [folder]


def test_a_cold_cache_is_filled_by_several_at_once(tmp_path, cache):
    """Threads have one process number, as containers that share a cache may have."""
    folder = write(tmp_path / "corpus", {"a.txt": lines("a topic", 400)})
    start = threading.Barrier(3)

    def load() -> tuple[str, list[int]]:
        start.wait()
        corpus = load_corpus(config(folder), "test")
        return corpus.fingerprint, corpus.splits["train"].tokens.tolist()

    with ThreadPoolExecutor(3) as pool:
        found = [job.result(timeout=60) for job in [pool.submit(load) for _ in range(3)]]
    assert found[0] == found[1] == found[2]
    assert len(list((cache / "corpora").iterdir())) == 1


def test_the_first_of_two_folders_stays_and_a_damaged_one_is_replaced(tmp_path):
    directory = tmp_path / "made"

    def fill(folder: Path) -> None:
        write(folder, {"late": "mine"})
        write(directory, {"early": "another process was faster"})

    make_folder(directory, fill, lambda folder: True)
    assert [path.name for path in directory.iterdir()] == ["early"]
    make_folder(directory, fill, lambda folder: False)
    assert [path.name for path in directory.iterdir()] == ["late"]
    assert list(tmp_path.iterdir()) == [directory]


def test_half_written_folders_of_other_containers_stay_for_a_day(tmp_path):
    """The process that writes one is not seen from here."""
    young, old = (tmp_path / f".moesaic-999999999-0000000{digit}.tmp" for digit in (1, 2))
    for path in (young, old):
        write(path, {"train.tokens": "half"})
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    make_folder(tmp_path / "made", lambda folder: write(folder, {"a": "whole"}), lambda folder: True)
    assert set(tmp_path.iterdir()) == {young, tmp_path / "made"}


def test_a_cache_that_others_may_read_stays_so(corpus_folder, cache):
    folder = load_corpus(config(corpus_folder), "test").tokenizer_path.parent
    assert folder.stat().st_mode & 0o777 == cache.stat().st_mode & 0o777


def test_an_unwritable_cache_is_one_message(tmp_path, corpus_folder, monkeypatch):
    (tmp_path / "file").write_text("a file where a folder should be")
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "file"))
    with pytest.raises(MoesaicError, match="cannot be written"):
        load_corpus(config(corpus_folder), "test")


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MOESAIC_CACHE", "~/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/caches")
    assert cache_directory() == tmp_path / "mine"
    monkeypatch.delenv("MOESAIC_CACHE")
    assert cache_directory() == tmp_path / "caches" / "moesaic"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_directory() == tmp_path / ".cache" / "moesaic"
    monkeypatch.setenv("MOESAIC_CACHE", "relative")
    assert cache_directory() == Path.cwd() / "relative"


def test_without_a_home_the_message_names_the_variable(monkeypatch):
    monkeypatch.delenv("MOESAIC_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])  # a container's user without an account
    with pytest.raises(MoesaicError, match=r"(?s)home directory is not known.*MOESAIC_CACHE"):
        cache_directory()


def test_the_cache_may_have_a_name_in_any_bytes(tmp_path, corpus_folder, monkeypatch):
    monkeypatch.setenv("MOESAIC_CACHE", f"{tmp_path}/caf\udce9")
    corpus = load_corpus(config(corpus_folder), "test")
    assert load_corpus(config(corpus_folder), "test", tokenizer=corpus.tokenizer_path).vocab_size == corpus.vocab_size


def test_checksums_are_of_the_files(corpus_folder, cache):
    folder = load_corpus(config(corpus_folder), "test").tokenizer_path.parent
    assert set(checked(folder, StreamFacts).files) == {path.name for path in folder.iterdir()} - {"corpus.json"}
    assert json.loads((folder / "corpus.json").read_text())["files"]["train.tokens"]["size"] > 0
