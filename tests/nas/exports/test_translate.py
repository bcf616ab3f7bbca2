"""Translating lines: one out for each in, in order, whatever is asked at a time; and one message for a wrong one."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moesaic
from moesaic.nas.config import Config
from moesaic.nas.data import load_parallel
from moesaic.nas.data.tokenizer import train_tokenizer
from moesaic.nas.exports.folder import load_exported, write_facts
from moesaic.nas.exports.translate import load_translator, translate_lines, utf8_lines
from moesaic.nas.tasks import LanguageModelling, Translation, load_task
from moesaic.nas.tasks.translator import Decoding
from moesaic.search_spaces import MoesaicError
from moesaic.supernet import scratch
from moesaic.supernet.checkpoint import save_tensors
from tests.nas.data.pair_tools import config, sentences, write_corpus
from tests.nas.search_tools import tiny_space
from tests.nas.tasks.test_translation import translating


@pytest.fixture(scope="module", params=["shared", "separate"])
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that are large enough for different translations."""
    folder = tmp_path_factory.mktemp("export")
    task = Translation(load_parallel(config(write_corpus(folder / "text", 80), vocabulary=request.param), "data"))
    model = scratch(task.vocab_size, 1, source_vocab_size=task.source_vocab_size)(translating())
    for parameter in model.parameters():
        parameter.data.mul_(3)
    write_facts(folder, model, task)
    save_tensors(folder / "model.safetensors", dict(model.named_parameters()), {})
    return folder


LINES = [*sentences(9), "", "  \t", "Wort \u2028 ⵣ", *sentences(3, seed=5)]


def test_an_export_keeps_both_vocabularies(export: Path) -> None:
    model = load_exported(export)
    assert (model.source_vocab_size is not None) == (export / "source_tokenizer.json").exists()


def test_a_tokenizer_of_another_vocabulary_is_refused(export: Path, tmp_path: Path) -> None:
    """Also where the text has none of the ids that the model lacks: its translation would have no meaning."""
    other = train_tokenizer([" ".join(f"{n:x}" for n in range(40_000))], 2000)
    for own in export.glob("*tokenizer.json"):
        folder = tmp_path / own.stem
        shutil.copytree(export, folder)
        other.save(str(folder / own.name))
        with pytest.raises(MoesaicError, match=f"{own.name}: the tokenizer is of another vocabulary"):
            list(moesaic.translate(folder, ["a"]))


def test_each_line_is_translated_as_if_it_were_alone(export: Path) -> None:
    found = list(moesaic.translate(str(export), LINES))
    alone = [next(iter(moesaic.translate(export, [line]))) for line in LINES]
    assert found == alone == list(moesaic.translate(export, LINES, batch_size=2))
    assert [bool(line.strip()) for line in LINES] == [bool(line) for line in found]
    assert all("\n" not in line for line in found)
    assert found != list(moesaic.translate(export, LINES, beam=1))


def test_lines_are_read_no_further_than_needed(export: Path) -> None:
    translator, longest = load_translator(export, Decoding(beam=1, batch_size=2))
    read: list[str] = []

    def typed() -> Iterator[str]:
        for line in sentences(6):
            read.append(line)
            yield line

    found = translate_lines(translator, longest, typed())
    next(found)
    assert len(read) == 2


@pytest.mark.parametrize("wrong", [b"cat " * 40 + b"\n", b"\xff\n"])
def test_lines_before_a_wrong_one_are_translated(export: Path, wrong: bytes) -> None:
    translator, longest = load_translator(export, Decoding())
    lines = utf8_lines(io.BytesIO(b"a cat\n\n" + wrong + b"a dog\n"), "input")
    found: list[str] = []
    with pytest.raises(MoesaicError, match=r"(line|input, line) 3: (the line is too long|is not UTF-8)"):
        for text in translate_lines(translator, longest, lines):
            found.append(text)
    assert len(found) == 2


def test_the_command_is_a_filter(export: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from moesaic.nas.cli import main; main()",
        "translate",
        str(export),
        "--beam",
        "2",
    ]
    done = subprocess.run(command, check=False, input="\n".join([*LINES, "cat " * 40]).encode(), capture_output=True)
    assert done.stdout.decode().split("\n")[:-1] == list(moesaic.translate(export, LINES, beam=2))
    assert done.returncode == 2
    assert done.stderr.decode().startswith(f"error: standard input, line {len(LINES) + 1}: the line is too long")


def test_a_model_that_does_not_translate_is_told(tmp_path: Path, corpus_folder: Path) -> None:
    data = Config.model_validate(
        {"data": {"kind": "text", "files": str(corpus_folder), "vocab_size": 300}, "budget": {"flops": "1 MFLOPs"}}
    ).data
    task = load_task(data, "linear", "data")
    assert isinstance(task, LanguageModelling)
    model = scratch(task.vocab_size, 0)(tiny_space().smallest)
    write_facts(tmp_path, model, task)
    save_tensors(tmp_path / "model.safetensors", dict(model.named_parameters()), {})
    with pytest.raises(MoesaicError, match="is not a model that translates: it has no encoder"):
        moesaic.translate(tmp_path, ["a"])
    with pytest.raises(MoesaicError, match="is not an exported model"):
        moesaic.translate(tmp_path / "nothing", ["a"])
