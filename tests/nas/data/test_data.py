import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from moesaic.nas.config import DataConfig
from moesaic.nas.data import load_corpus
from moesaic.nas.data.files import SPLITS, TextFile, find_files, split_texts
from moesaic.search_spaces import MoesaicError


def config(folder: Path | str, **changes) -> DataConfig:
    return DataConfig(**{"kind": "text", "files": [str(folder)], "vocab_size": 300, "sequence_length": 16, **changes})


def files_of(texts: dict[str, str], folder: Path) -> list[TextFile]:
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [TextFile(name, folder / name) for name in texts]


def test_every_file_is_in_exactly_one_split_whatever_files_are_beside_it(tmp_path):
    files = files_of({f"f{i}": f"text {i}\n" for i in range(60)}, tmp_path)
    found = {split: list(split_texts(files, split)) for split in SPLITS}
    assert sorted(text for texts in found.values() for text in texts) == sorted(f.path.read_text() for f in files)
    assert all(found.values())
    fewer = files[:40]
    for split in SPLITS:
        kept = {f.path.read_text() for f in fewer}
        assert list(split_texts(fewer, split)) == [text for text in found[split] if text in kept]


def test_few_files_are_cut_without_loss_or_overlap(tmp_path):
    text = "".join(f"line {i}\n" for i in range(500))
    files = files_of({"one": text}, tmp_path)
    assert "".join("".join(split_texts(files, split)) for split in SPLITS) == text
    assert all("".join(split_texts(files, split)) for split in SPLITS)


def test_streams_hold_the_text_and_bits_per_byte_counts_its_bytes(corpus_folder):
    corpus = load_corpus(config(corpus_folder), "test")
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_path))
    texts = list(split_texts(find_files(config(corpus_folder), "test"), "validation"))
    stream = corpus.splits["validation"]
    assert tokenizer.decode(list(map(int, stream.tokens)), skip_special_tokens=True) == "".join(texts)
    assert stream.text_bytes == sum(len(text.encode()) for text in texts)
    uniform = math.log(corpus.vocab_size)
    expected = len(stream.tokens) * math.log2(corpus.vocab_size) / stream.text_bytes
    assert corpus.bits_per_byte("validation", uniform) == pytest.approx(expected)


def test_streams_are_memory_mapped_and_made_once(corpus_folder):
    said: list[str] = []
    first = load_corpus(config(corpus_folder, vocab_size=310), "test", said.append)
    assert any("tokenizer" in text for text in said)
    said.clear()
    second = load_corpus(config(corpus_folder, vocab_size=310), "test", said.append)
    assert said == ["reading files"]
    assert isinstance(second.splits["train"].tokens, np.memmap)
    assert first.fingerprint == second.fingerprint


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


def test_a_changed_text_is_another_corpus(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some words to learn " * 400)
    before = load_corpus(config(path), "test").fingerprint
    path.write_text("other words to learn " * 400)
    assert load_corpus(config(path), "test").fingerprint != before


def test_a_given_tokenizer_is_used(corpus_folder, tmp_path):
    corpus = load_corpus(config(corpus_folder), "test")
    other = tmp_path / "other.txt"
    other.write_text("abc def ghi\n" * 400)
    with_given = load_corpus(config(other), "test", tokenizer=corpus.tokenizer_path)
    assert with_given.vocab_size == corpus.vocab_size
    assert with_given.tokenizer_path.read_text() == corpus.tokenizer_path.read_text()


def test_folders_globs_and_files_find_the_same_text_once(corpus_folder):
    names = {f.path.resolve() for f in find_files(config(corpus_folder), "test")}
    assert {f.path.resolve() for f in find_files(config(f"{corpus_folder}/*.txt"), "test")} == names
    both = DataConfig(kind="text", files=[str(corpus_folder), f"{corpus_folder}/text00.txt"])
    assert len(find_files(both, "test")) == len(names)


def test_the_standard_library_is_there_without_its_tests():
    files = find_files(DataConfig(), "test")
    names = {file.name for file in files}
    assert {"os.py", "json/decoder.py"} <= names
    assert not any({"test", "tests", "site-packages"}.intersection(name.split("/")) for name in names)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"tiny", "shorter than the context|too little text"),
        (b"text\x00with zero", "binary"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "binary"),
    ],
)
def test_unusable_files_are_refused(tmp_path, content, words):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(MoesaicError, match=words):
        load_corpus(config(path), "run.yaml:3: data.files")


def test_binary_files_in_a_folder_are_passed_over(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x00\x01")
    with pytest.raises(MoesaicError, match="empty"):
        find_files(config(tmp_path), "run.yaml")
    (tmp_path / "b.txt").write_text("text")
    assert [file.name for file in find_files(config(tmp_path), "run.yaml")] == ["b.txt"]


def test_a_missing_file_names_a_similar_one(tmp_path):
    (tmp_path / "corpus.txt").write_text("text")
    with pytest.raises(MoesaicError, match="no such file") as caught:
        find_files(config(tmp_path / "corpse.txt"), "run.yaml:2: data.files")
    assert caught.value.nearest == "corpus.txt"
    assert "run.yaml:2" in str(caught.value)


def test_an_unwritable_cache_is_one_message(tmp_path, corpus_folder, monkeypatch):
    (tmp_path / "file").write_text("a file where a folder should be")
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "file"))
    with pytest.raises(MoesaicError, match="cannot be written"):
        load_corpus(config(corpus_folder), "test")


def test_a_truncated_stream_is_noticed(tmp_path, corpus_folder, monkeypatch):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    corpus = load_corpus(config(corpus_folder), "test")
    stream = corpus.tokenizer_path.parent / "train.tokens"
    stream.write_bytes(stream.read_bytes()[:-10])
    with pytest.raises(MoesaicError, match="is damaged"):
        load_corpus(config(corpus_folder), "test")
