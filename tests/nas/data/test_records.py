"""Files of records: every format gives the same documents, and damage is one message with file, record and field."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from moesaic.nas.config import DataConfig
from moesaic.nas.data import load_corpus
from moesaic.nas.data.records import documents, has_records
from moesaic.nas.data.tokenizer import train_tokenizer
from moesaic.search_spaces import MoesaicError

Records = list[str | None]


def as_lines(records: Records, field: str) -> bytes:
    return "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(records)).encode()


def table_of(records: Records, field: str) -> pa.Table:
    return pa.table({"id": range(len(records)), field: pa.array(records, pa.string())})


def as_parquet(records: Records, field: str) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(table_of(records, field), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def as_stream(records: Records, field: str) -> bytes:
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, table_of(records, field).schema) as writer:
        writer.write_table(table_of(records, field), max_chunksize=2)
    return sink.getvalue().to_pybytes()


def as_file(records: Records, field: str) -> bytes:
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, table_of(records, field).schema) as writer:
        writer.write_table(table_of(records, field), max_chunksize=2)
    return sink.getvalue().to_pybytes()


FORMATS: dict[str, tuple[str, Callable[[Records, str], bytes]]] = {
    "lines": ("a.jsonl", as_lines),
    "packed lines": ("a.jsonl.gz", lambda records, field: gzip.compress(as_lines(records, field))),
    "parquet": ("a.parquet", as_parquet),
    "arrow stream": ("a.arrow", as_stream),
    "arrow file": ("a.arrow", as_file),
}


@settings(max_examples=40)
@given(st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=7))
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_records_with_text_in_their_order(kind: str, records: Records) -> None:
    name, write = FORMATS[kind]
    found = documents(Path(name), write(records, "body"), "body", name)
    expected = [text for text in records if text and text.strip()]
    assert found.texts == expected
    assert found.empty == len(records) - len(expected)
    assert has_records(Path(name))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_missing_field_is_named_with_the_nearest(kind: str) -> None:
    name, write = FORMATS[kind]
    message = r"(?s)no field text.*found: +id, texts.*nearest: data.field=texts"
    with pytest.raises(MoesaicError, match=message) as caught:
        documents(Path(name), write(["one"], "texts"), "text", name)
    assert caught.value.where is not None and caught.value.where.startswith(name)


DAMAGE = {
    "cut parquet": ("a.parquet", as_parquet(["one", "two"], "text")[:-20], "a.parquet: is damaged"),
    "cut stream": ("a.arrow", as_stream(["one", "two", "three"], "text")[:-150], "a.arrow: is damaged"),
    "no arrow": ("a.arrow", b"plain text", "a.arrow: is damaged"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b"{}" * 50)[:-9], "a.jsonl.gz: is damaged"),
    "no JSON": ("a.jsonl", b'{"text": "one"}\n\n{oops\n', "a.jsonl:3: is not JSON"),
    "no object": ("a.jsonl", b"[1]\n", "a.jsonl:1: is not a JSON object"),
    "a number": ("a.jsonl", b'{"text": 3}\n', "(?s)a.jsonl:1: the field text is no text.*found: +int"),
    "numbers": ("a.parquet", as_parquet([], "x"), "no field text"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_message(name: str) -> None:
    path, data, message = DAMAGE[name]
    with pytest.raises(MoesaicError, match=message):
        documents(Path(path), data, "text", path)


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": [1, 2]}), sink)
    with pytest.raises(MoesaicError, match=r"(?s)the field text is no text.*int64"):
        documents(Path("a.parquet"), sink.getvalue().to_pybytes(), "text", "a.parquet")


def stories(count: int, seed: int = 0) -> Records:
    return [f"Story {seed} {n}: " + " ".join(f"word{(n * 7 + k * seed) % 50}" for k in range(40)) for n in range(count)]


def test_a_saved_dataset_keeps_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of ``DatasetDict.save_to_disk``."""
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    told: list[str] = []
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    for number, split in enumerate(("train", "validation", "test")):
        folder = tmp_path / "set" / split
        folder.mkdir()
        (folder / "data-00000-of-00001.arrow").write_bytes(as_stream([*stories(30, number), None], "text"))
        for name in ("state.json", "dataset_info.json"):
            (folder / name).write_text('{"text": "no part of the data"}')
    config = DataConfig(kind="text", files=[str(tmp_path / "set")], vocab_size=300, sequence_length=16)
    corpus = load_corpus(config, "data.files", told.append)
    sizes = {
        split: sum(len(text.encode()) for text in stories(30, number) if text)
        for number, split in enumerate(corpus.splits)
    }
    assert {split: stream.text_bytes for split, stream in corpus.splits.items()} == sizes
    assert any("split by file names: 1 train, 1 validation, 1 test" in line for line in told)
    assert any("7 about the data" in line and "1 of 31 records without text" in line for line in told)


def test_records_are_divided_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    records = stories(200)
    (tmp_path / "all.jsonl").write_bytes(as_lines(records, "text"))
    config = DataConfig(kind="text", files=[str(tmp_path / "all.jsonl")], vocab_size=300, sequence_length=16)
    corpus = load_corpus(config, "data.files")
    whole = {len(text.encode()) for text in records if text}
    assert sum(stream.text_bytes for stream in corpus.splits.values()) == sum(len(t.encode()) for t in records if t)
    assert all(stream.text_bytes >= min(whole) for stream in corpus.splits.values())


def test_another_field_is_another_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    lines = (json.dumps({"one": one, "two": two}) for one, two in zip(stories(60, 1), stories(60, 2), strict=True))
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    config = DataConfig(kind="text", files=[str(tmp_path / "all.jsonl")], vocab_size=300, sequence_length=16)
    prints = {load_corpus(config.model_copy(update={"field": f}), "data.files").fingerprint for f in ("one", "two")}
    assert len(prints) == 2


def test_a_given_tokenizer_encodes_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n".join(filter(None, stories(100))))
    tokenizer = train_tokenizer(["word word1 word2 Story"], 280)
    (tmp_path / "own").mkdir()
    tokenizer.save(str(tmp_path / "own" / "tokenizer.json"))
    config = DataConfig(
        kind="text", files=[str(tmp_path / "text.txt")], tokenizer=str(tmp_path / "own"), sequence_length=16
    )
    corpus = load_corpus(config, "data.files")
    assert corpus.vocab_size == tokenizer.get_vocab_size()
    ids = corpus.splits["train"].tokens[:200].tolist()
    assert tokenizer.decode(ids) in (tmp_path / "text.txt").read_text()
    with pytest.raises(MoesaicError, match=r"(?s)another vocabulary.*ids below the model's 100"):
        load_corpus(config, "data.files", vocab_size=100)
    assert load_corpus(config, "data.files", vocab_size=500).vocab_size == 500


@pytest.mark.parametrize(("content", "message"), [(None, "no tokenizer.json"), ("{", "is not a tokenizer")])
def test_no_tokenizer_is_one_message(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    config = DataConfig(tokenizer=str(tmp_path))
    with pytest.raises(MoesaicError, match=message):
        load_corpus(config, "data")
