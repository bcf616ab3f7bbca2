"""Parallel text: what is read, divided, left out and told, and that a cached corpus gives it back exactly."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.nas.config import DataConfig
from moesaic.nas.data import ParallelCorpus, load_parallel, open_parallel
from moesaic.nas.data.parallel import SOURCE_TOKENIZER
from moesaic.nas.data.streams import TOKENIZER
from moesaic.nas.data.tokenizer import Vocabulary, read_tokenizer, train_tokenizer
from moesaic.search_spaces import MoesaicError
from tests.nas.data.pair_tools import config, sentences, translated, write_corpus, write_pair

PAIRS = [(text, translated(text)) for text in dict.fromkeys(sentences(400))]


def texts(corpus: ParallelCorpus, split: str) -> list[tuple[str, str]]:
    """The pairs of a split, decoded."""
    target = read_tokenizer(corpus.folder / TOKENIZER)
    source = target if corpus.source_vocab_size is None else read_tokenizer(corpus.folder / SOURCE_TOKENIZER)
    pairs = corpus.splits[split]
    found = []
    for number in pairs.kept:
        one, other = pairs.source[number], pairs.target[number]
        assert (one[-1], other[-1]) == (corpus.source_end, corpus.end)
        found.append((source.decode(one[:-1].tolist()), target.decode(other[:-1].tolist())))
    return found


@pytest.mark.parametrize("vocabulary", ["shared", "separate"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_pair_is_encoded_exactly_and_in_its_split(tmp_path: Path, vocabulary: str, packed: bool) -> None:
    parts = {"train": PAIRS[60:], "validation": PAIRS[:30], "test": PAIRS[30:60]}
    files = {split: write_pair(tmp_path, split, pairs, packed) for split, pairs in parts.items()}
    said: list[str] = []
    corpus = load_parallel(config(files, vocabulary=vocabulary), "data", said.append)
    assert {split: texts(corpus, split) for split in parts} == parts
    assert said[-1] == f"pairs: {len(parts['train'])} train, 30 validation, 30 test"
    assert (corpus.source_vocab_size is None) == (vocabulary == "shared")
    assert corpus.references("test") == [target for _, target in parts["test"]]


def test_a_tsv_is_the_same_as_two_files(tmp_path: Path) -> None:
    path = tmp_path / "all.tsv.gz"
    path.write_bytes(gzip.compress("".join(f"{one}\t{other}\r\n" for one, other in PAIRS).encode()))
    one = load_parallel(config([str(path)]), "data")
    other = load_parallel(config(write_pair(tmp_path, "all", PAIRS)), "data")
    for split in ("train", "validation", "test"):
        assert texts(one, split) == texts(other, split)


def test_splits_without_files_are_cut_by_content_not_order(tmp_path: Path) -> None:
    shuffled = random.Random(1).sample(PAIRS, len(PAIRS))
    first, second = (
        load_parallel(config(write_pair(tmp_path / str(n), "all", pairs + pairs[:50])), "data")
        for n, pairs in enumerate((PAIRS, shuffled))
    )
    found = {split: set(texts(first, split)) for split in first.splits}
    assert found == {split: set(texts(second, split)) for split in second.splits}
    assert set.union(*found.values()) == set(PAIRS) and sum(map(len, found.values())) == len(PAIRS)
    assert all(0.02 < len(found[split]) / len(PAIRS) < 0.1 for split in ("validation", "test"))


def test_only_test_pairs_given_leaves_validation_to_be_cut(tmp_path: Path) -> None:
    files = {"train": write_pair(tmp_path, "train", PAIRS[20:]), "test": write_pair(tmp_path, "test", PAIRS[:20])}
    corpus = load_parallel(config(files), "data")
    assert texts(corpus, "test") == PAIRS[:20]
    assert set(texts(corpus, "train")) | set(texts(corpus, "validation")) == set(PAIRS[20:])


def test_what_is_left_out_is_counted_and_told(tmp_path: Path) -> None:
    long = ("cat " * 30, "Katze " * 30)
    files = {
        "train": write_pair(tmp_path, "train", [*PAIRS[60:], PAIRS[0], ("", "leer"), ("empty", " "), long]),
        "validation": write_pair(tmp_path, "validation", [*PAIRS[:30], ("\t", "x")]),
        "test": write_pair(tmp_path, "test", [*PAIRS[30:60], (long[0] + "a", long[1])]),
    }
    said: list[str] = []
    corpus = load_parallel(config(files), "data", said.append)
    assert said[-1] == (
        f"pairs: {len(PAIRS) - 60} train, 30 validation, 30 test; left out: 1 also for validation or testing, "
        "3 with an empty line, 2 longer than sequence_length = 24 (1 train, 1 test)"
    )
    assert texts(corpus, "test") == PAIRS[30:60]
    again: list[str] = []
    assert load_parallel(config(files, sequence_length=64), "data", again.append).fingerprint == corpus.fingerprint
    assert again == ["reading files", said[-1].split(", 2 longer")[0].replace("30 test", "31 test").replace(
        f"{len(PAIRS) - 60} train", f"{len(PAIRS) - 59} train")]  # fmt: skip


def test_a_line_ends_with_a_line_feed_and_with_nothing_else(tmp_path: Path) -> None:
    """Python's splitlines would end one at each of these and shift all that follow."""
    odd = [(f"cat{mark}dog", f"Katze{mark}Hund") for mark in ("\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\r")]
    files = {"train": write_pair(tmp_path, "train", PAIRS[20:]), "validation": write_pair(tmp_path, "val", PAIRS[:20])}
    corpus = load_parallel(config(files | {"test": write_pair(tmp_path, "test", odd)}), "data")
    assert texts(corpus, "test") == odd
    assert corpus.references("test") == [target for _, target in odd]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1), min_size=2))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, found: list[str]) -> None:
    wanted = [(f"a{text}b", f"c{text}d") for text in found] + [("x<|endoftext|>y", "<|endoftext|>")]
    folder = tmp_path_factory.mktemp("any")
    files = {"train": write_pair(folder, "train", PAIRS), "validation": write_pair(folder, "val", PAIRS[:9])}
    corpus = load_parallel(config(files | {"test": write_pair(folder, "t", wanted)}, sequence_length=9999), "data")
    assert texts(corpus, "test") == wanted


def damaged(folder: Path, name: str, data: bytes) -> dict[str, list[str]]:
    """Good files, but for one with ``data`` in it."""
    files = write_corpus(folder, 60)
    (folder / name).write_bytes(data)
    return {split: [str(folder / name) if Path(path).stem == Path(name).stem.removesuffix(".de") and
                    name.split(".")[1] in path else path for path in paths]
            for split, paths in files.items()}  # fmt: skip


TEXT = "".join(f"{text}\n" for text in sentences(60)).encode()
WRONG = {
    "lines": ("train.de", TEXT, r"(?s)data.files: the files have different numbers of lines.*train.en: \d+, .*: 60"),
    "truncated": ("train.de.gz", gzip.compress(TEXT)[:-30], r"(?s)train.de.gz: is damaged: Compressed file ended"),
    "damaged": ("train.de.gz", gzip.compress(TEXT)[:20] + b"xx" * 40, r"train.de.gz: is damaged"),
    "no gzip": ("train.de.gz", TEXT, r"train.de.gz: is damaged: Not a gzipped file"),
    "not UTF-8": ("test.de", b"gut\n" * 6 + "schön\n".encode("latin-1"), r"test.de:7: is not UTF-8"),
    "empty reference": ("test.de", b"gut\n" * 6 + b" \n" + b"gut\n" * 33, r"test.de:7: empty reference"),
    "empty source": ("test.en", b"good\n" * 6 + b" \n" + b"good\n" * 33, r"test.en:7: empty sentence to translate"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_message(name: str, tmp_path: Path) -> None:
    file, data, message = WRONG[name]
    with pytest.raises(MoesaicError, match=message):
        load_parallel(config(damaged(tmp_path, file, data)), "run.yaml:2: data.files")


def test_a_line_of_a_tsv_has_one_tab(tmp_path: Path) -> None:
    path = tmp_path / "all.tsv"
    for line in ("no tab", "two\ttabs\there", ""):
        path.write_text("".join(f"{one}\t{other}\n" for one, other in PAIRS) + f"{line}\na\tb\n")
        with pytest.raises(MoesaicError, match=rf"all.tsv:{len(PAIRS) + 1}: a line needs exactly one tab"):
            load_parallel(config([str(path)]), "data")


def test_a_missing_file_has_the_nearest_name(tmp_path: Path) -> None:
    files = write_corpus(tmp_path, 60)
    files["train"][1] = str(tmp_path / "trian.de")
    with pytest.raises(MoesaicError, match=r"(?s)here: no such file.*nearest: *train.de"):
        load_parallel(config(files), "here")
    files["train"][1] = str(tmp_path)
    with pytest.raises(MoesaicError, match="here: is a folder"):
        load_parallel(config(files), "here")


def test_files_that_no_pairs_can_be_read_of_are_refused_by_the_configuration() -> None:
    for files, message in (
        ({"train": ["a", "b", "c"]}, "the train split is not two files"),
        ({"train": ["a", "b"], "test": ["c"]}, "the test split is not two files"),
        ([], "data of kind parallel needs files"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(kind="parallel", files=files)
    with pytest.raises(ValueError, match="one language has one vocabulary"):
        DataConfig(vocabulary="separate")
    with pytest.raises(ValueError, match="a given tokenizer is that of both languages"):
        DataConfig(kind="parallel", files=["a", "b"], tokenizer="t", vocabulary="separate")


def test_too_few_pairs_of_a_length_are_told(tmp_path: Path) -> None:
    files = write_corpus(tmp_path, 60)
    with pytest.raises(
        MoesaicError, match=r"(?s)split has too few pairs.*of which \d+ have at most sequence_length = 2"
    ):
        load_parallel(config(files).model_copy(update={"sequence_length": 2}), "data")


def test_a_given_tokenizer_is_used_and_must_fit(tmp_path: Path) -> None:
    files = write_corpus(tmp_path, 60)
    tokenizer = train_tokenizer([source for source, _ in PAIRS], 290)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    corpus = load_parallel(config(files, tokenizer=str(tmp_path), vocab_size=2048), "data")
    assert corpus.vocab_size == tokenizer.get_vocab_size()
    path = tmp_path / "tokenizer.json"
    assert load_parallel(config(files), "data", vocabulary=Vocabulary(path, 500)).vocab_size == 500
    with pytest.raises(MoesaicError, match=r"tokenizer.json: the tokenizer is of another vocabulary"):
        load_parallel(config(files), "data", vocabulary=Vocabulary(path, 280))
    with pytest.raises(
        MoesaicError, match=r"(?s)source.json: the tokenizer is of another vocabulary.*below the model's 9"
    ):
        tokenizer.save(str(tmp_path / "source.json"))
        load_parallel(config(files), "data", vocabulary=Vocabulary(path, 500, tmp_path / "source.json", 9))
    endless = path.read_text().replace("<|endoftext|>", "<start>")
    path.write_text(endless)
    with pytest.raises(MoesaicError, match="the tokenizer has no token that ends a sentence"):
        load_parallel(config(files, tokenizer=str(tmp_path), vocab_size=2048), "data")


def test_a_corpus_is_encoded_once_and_again_when_the_cache_is_damaged(tmp_path: Path) -> None:
    files = write_corpus(tmp_path, 60, seed=3)
    first = load_parallel(config(files), "data")
    said: list[str] = []
    again = load_parallel(config(files), "data", said.append)
    assert len(said) == 2 and again.folder == first.folder
    for damage in ("train.source.tokens", "test.target.offsets", "test.references.txt"):
        path = first.folder / damage
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(MoesaicError, match=f"{damage}: was cut"):
            open_parallel(first.folder, 24, "data")
        said.clear()
        whole = load_parallel(config(files), "data", said.append)
        assert any("the cached corpus is damaged and is made again" in line for line in said)
        assert texts(whole, "test") == texts(open_parallel(first.folder, 24, "data"), "test")
    Path(files["train"][1]).write_text(Path(files["train"][1]).read_text().replace("Hund", "Hündin"))
    assert load_parallel(config(files), "data").fingerprint != first.fingerprint
