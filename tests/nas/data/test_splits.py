import random
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.nas.data.files import SPLITS, TextFile, find_files
from moesaic.nas.data.splits import Piece, chunks, divide, division_hash
from moesaic.search_spaces import MoesaicError
from tests.nas.data.data_tools import config, found, lines, texts_of, write

SIZES = st.lists(st.integers(1, 10**6), min_size=1, max_size=120)


def files_of(sizes: list[int], seed: int = 0) -> list[TextFile]:
    rng = random.Random(seed)
    return [TextFile(Path(str(n)), f"{rng.getrandbits(256):064x}", size) for n, size in enumerate(sizes)]


def shares(pieces: dict[str, list[Piece]], file: TextFile) -> dict[str, float]:
    return {split: piece.end - piece.start for split, parts in pieces.items() for piece in parts if piece.file == file}


@given(SIZES, st.integers(0, 1000))
def test_no_split_is_empty_and_all_text_is_in_one_split(sizes, seed):
    files = files_of(sizes, seed)
    pieces = divide(files)
    total = sum(sizes)
    for split in ("validation", "test"):
        assert 0.0099 * total <= sum(piece.size for piece in pieces[split]) < 0.5 * total
    assert sum(piece.size for piece in pieces["train"]) > 0.3 * total
    for file in files:
        assert sum(shares(pieces, file).values()) == pytest.approx(1)


@given(st.lists(st.integers(50, 100), min_size=40, max_size=80), st.integers(0, 1000))
def test_another_file_moves_at_most_the_two_that_filled_a_gap(sizes, seed):
    files = files_of(sizes, seed)
    before, after = divide(files[:-1]), divide(files)
    moved = [file for file in files[:-1] if shares(before, file) != shares(after, file)]
    assert len(moved) <= 2


def test_names_and_places_do_not_matter(tmp_path):
    texts = {f"part{number:02}": lines(f"topic {number}") for number in range(30)}
    renamed = {f"doc{number}/text.txt": text for number, text in enumerate(texts.values())}
    one, other = texts_of(write(tmp_path / "one", texts)), texts_of(write(tmp_path / "two", renamed))
    assert one == other
    assert all(one.values())
    assert texts_of(f"{tmp_path}/two/doc*/text.txt") == one
    found = [find_files(config(tmp_path / name), "test").files for name in ("one", "two")]
    assert division_hash(found[0]) == division_hash(found[1])


def test_equal_texts_are_in_one_split_only(tmp_path):
    texts = {f"copy{number:02}": lines(f"topic {number % 10}", 200) for number in range(70)}
    names, said = found(write(tmp_path, texts))
    assert names == {f"copy0{number}" for number in range(10)}
    assert "60 repeated (copy10, copy11, copy12, ...)" in said
    for one, other in combinations(texts_of(tmp_path).values(), 2):
        assert not set("".join(one).splitlines()) & set("".join(other).splitlines())


@pytest.mark.parametrize("text", [lines("one", 500), "a" * 2000, "word " * 400, "x" * 1700 + "\n" + "y" * 300 + "\n"])
def test_one_file_is_cut_without_loss_or_overlap(tmp_path, text):
    parts = texts_of(write(tmp_path, {"a.txt": text}))
    assert "".join("".join(parts[split]) for split in SPLITS) == text
    assert all(len("".join(parts[split])) >= 0.025 * len(text) for split in SPLITS)


def test_a_file_with_most_of_the_text_is_cut_wherever_its_hash_falls(tmp_path):
    for number in range(20):
        folder = tmp_path / str(number)
        write(folder, {f"small{index}": lines(f"small {number} {index}", 2) for index in range(40)})
        write(folder, {"large": lines(f"large {number}", 4000)})
        sizes = {split: sum(map(len, texts)) for split, texts in texts_of(folder).items()}
        assert 0.04 < sizes["validation"] / sum(sizes.values()) < 0.08
        assert 0.04 < sizes["test"] / sum(sizes.values()) < 0.08


def test_given_splits_are_kept(tmp_path):
    write(tmp_path, {name: lines(name) for name in ("a", "b", "c", "d")})
    files = {"train": [f"{tmp_path}/a", f"{tmp_path}/b"], "validation": f"{tmp_path}/c", "test": [f"{tmp_path}/d"]}
    parts = texts_of(files)
    assert sorted(parts["train"]) == [lines("a"), lines("b")]
    assert (parts["validation"], parts["test"]) == ([lines("c")], [lines("d")])


def test_a_split_that_is_not_given_is_taken_from_training_text(tmp_path):
    write(tmp_path, {"train": lines("train", 400), "test": lines("test")})
    parts = texts_of({"train": f"{tmp_path}/train", "test": f"{tmp_path}/test"})
    assert parts["test"] == [lines("test")]
    assert "".join(parts["train"] + parts["validation"]) == lines("train", 400)
    assert 0.03 < len(parts["validation"][0]) / len(lines("train", 400)) < 0.07


def test_text_given_for_testing_is_not_trained_on(tmp_path):
    write(tmp_path, {"train/a": lines("a"), "train/b": lines("b"), "test/a": lines("a"), "validation/v": lines("v")})
    files = {split: f"{tmp_path}/{split}" for split in SPLITS}
    assert texts_of(files) == {"train": [lines("b")], "validation": [lines("v")], "test": [lines("a")]}
    assert "1 repeated (a)" in found(files)[1]
    with pytest.raises(MoesaicError, match="the files for train hold no text of their own"):
        found({**files, "train": f"{tmp_path}/train/a"})


@pytest.mark.parametrize(
    "names",
    [
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("train.txt", "valid.txt", "test.txt"),
        ("training/x.txt", "dev/x.txt", "testing/x.txt"),
        ("train-00000-of-00001.txt", "validation-00000-of-00001.txt", "test-00000-of-00001.txt"),
    ],
)
def test_splits_of_a_folder_are_kept(tmp_path, names):
    write(tmp_path, {name: lines(name) for name in names})
    for files in (tmp_path, f"{tmp_path}/**/*.t*"):
        assert list(texts_of(files).values()) == [[lines(name)] for name in names]
        assert "split by file names: 1 train, 1 validation, 1 test" in found(files)[1]


def test_what_describes_a_data_set_is_in_no_split(tmp_path):
    names = ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")
    write(tmp_path, {name: lines(name) for name in (*names, "README.md", "LICENSE")})
    assert list(texts_of(tmp_path).values()) == [[lines(name)] for name in names]
    assert "2 about the data (LICENSE, README.md)" in found(tmp_path)[1]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("train.txt", "valid.txt", "test.txt", "notes.md"), "notes.md does not name one"),
        (("train.txt", "test.txt", "train_test.txt"), "train_test.txt does not name one"),
        (("valid.txt", "test.txt"), "none is for training"),
    ],
)
def test_doubtful_names_are_no_splits_and_that_is_said(tmp_path, names, reason):
    write(tmp_path, {name: lines(name) for name in names})
    said = found(tmp_path)[1]
    assert reason in said
    assert "data.files: {train: ..." in said
    assert len(texts_of(tmp_path)["test"]) == len(names)  # a part of each


@pytest.mark.parametrize("names", [("contest.txt", "trainer.txt"), ("test.txt",), ("train.txt", "a.txt")])
def test_ordinary_names_say_nothing_about_splits(tmp_path, names):
    write(tmp_path, {name: lines(name) for name in names})
    assert "split" not in found(tmp_path)[1]


@given(st.text("ab\n", max_size=40))
def test_chunks_are_the_text(text):
    assert "".join(chunks(text)) == text


def test_chunks_of_a_text_without_lines_are_bounded():
    text = "a" * (5 << 20)
    pieces = list(chunks(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2 << 20


def test_a_file_changed_while_it_is_read_is_refused(tmp_path):
    write(tmp_path, {"a": lines("a")})
    pieces = divide(find_files(config(tmp_path), "test").files)
    write(tmp_path, {"a": lines("b")})
    with pytest.raises(MoesaicError, match="was changed"):
        pieces["train"][0].texts()
