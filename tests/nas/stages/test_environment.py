"""Runs in the surroundings that users have: a run inside its corpus, a purged cache, other encodings, no UTF-8."""

import io
import math
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from rich.text import Text

from moesaic.nas import cli
from moesaic.nas.api import open_run as open_by_path
from moesaic.nas.config import load_config, load_retrain_file
from moesaic.nas.data import load_corpus
from moesaic.nas.exports.figures import ExportFigures
from moesaic.nas.exports.folder import export_model
from moesaic.nas.stages import calibrate_latency
from moesaic.nas.terminal.tables import output_console
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.files import read_value
from moesaic.supernet import scratch
from moesaic.supernet.metrics import MetricLog
from tests.nas.conftest import write_corpus
from tests.nas.run_tools import open_run, said


@pytest.mark.parametrize("out", ["o", "deep/runs/o", "."])
def test_a_run_inside_its_corpus_does_not_change_it(micro_config, tmp_path, monkeypatch, out):
    write_corpus(tmp_path, files=3, words=400)
    shutil.copy(micro_config, tmp_path / "run.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    before = open_run(Path("run.yaml"), Path(out), "data.files=.").task.fingerprint
    for name in ("supernet/inputs.json", "exports/best/README.md", "config.yaml", "previous/search-1/x.json"):
        (Path(out) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(out) / name).write_text("{}")
    with Path("run.yaml").open("a") as file:
        file.write("# a comment\n")
    assert open_run(Path("run.yaml"), Path(out), "data.files=.").task.fingerprint == before
    Path("more.txt").write_text("more text of the user\n" * 20)
    assert open_run(Path("run.yaml"), Path(out), "data.files=.").task.fingerprint != before


def test_an_export_names_its_text_from_any_folder(micro_config, quick_run, tmp_path, monkeypatch):
    (tmp_path / "work [1]").mkdir()
    monkeypatch.chdir(tmp_path / "work [1]")
    write_corpus(Path("texts"), files=3, words=400)
    run = open_run(micro_config, tmp_path / "run", "data.files=[texts/*.txt]")
    figures = read_value(quick_run / "exports" / "best" / "figures.json", ExportFigures)
    model = scratch(run.task.vocab_size, seed=0)(run.space.smallest)
    export_model(tmp_path / "best", model.eval(), run.config, run.task, figures, run.task.held_out("test", 1))
    monkeypatch.chdir("/")
    file = load_retrain_file(tmp_path / "best" / "retrain.yaml")
    corpus = load_corpus(file.data, "test", tokenizer=tmp_path / "best" / "tokenizer.json")
    assert corpus.splits["train"].text_bytes == run.task.corpus.splits["train"].text_bytes


class MeasuredAgain(Exception):
    pass


@pytest.mark.parametrize(
    ("damage", "said_of"),
    [
        (lambda folder: (folder / "measurements.csv").unlink(), ""),
        (lambda folder: (folder / "predictor.json").unlink(), ""),
        (lambda folder: (folder / "predictor.json").write_text('{"coeff'), "predictor.json"),
        (lambda folder: (folder / "predictor.json").write_text("{}"), "predictor.json"),
    ],
)
def test_a_purged_or_damaged_calibration_is_measured_again(
    micro_config, calibration, tmp_path, monkeypatch, damage, said_of
):
    monkeypatch.setattr(calibrate_latency, "NOISY", math.inf)
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))

    def calibrate(*arguments):
        raise MeasuredAgain

    monkeypatch.setattr(calibrate_latency, "calibrate", calibrate)
    with pytest.raises(MeasuredAgain):
        calibrate_latency.calibrated(open_run(micro_config, tmp_path / "first"))
    run = open_run(micro_config, tmp_path / "run")
    with pytest.raises(MeasuredAgain):
        calibrate_latency.calibrated(run)
    assert run.calibration is not None
    shutil.copytree(calibration, run.calibration)
    whole = open_run(micro_config, tmp_path / "whole")
    assert calibrate_latency.calibrated(whole) == run.calibration
    damage(run.calibration)
    again = open_run(micro_config, tmp_path / "again")
    with pytest.raises(MeasuredAgain):
        calibrate_latency.calibrated(again)
    assert said_of in said(again)
    assert not said_of or str(tmp_path / "cache") in said(again)


def test_a_text_for_one_test_window_gives_finite_scores(micro_config, tmp_path):
    words = (
        (tmp_path / "train.txt", "some words to learn from\n" * 200),
        (tmp_path / "test.txt", "a few of the words\n" * 4),
    )
    for path, text in words:
        path.write_text(text)
    run = open_run(micro_config, tmp_path / "o", f"data.files={[str(path) for path, _ in words]}")
    assert 33 <= len(run.task.corpus.splits["test"].tokens) < 66
    model = scratch(run.task.vocab_size, seed=0)(run.space.smallest).eval()
    evaluation = run.judge("test", 8, model)(run.space.smallest)
    assert len(evaluation.sequence_losses) == 2
    assert all(map(math.isfinite, (evaluation.loss, evaluation.standard_error)))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_lacks_is_printed_as_an_escape(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setattr(cli, "app", lambda: output_console().print(Text("caf\udce9: 1 ± 2, ██ ≤ 3")))
    cli.main()
    sys.stdout.flush()
    text = written.getvalue().decode(encoding)
    assert text.encode("ascii", "backslashreplace") == b"caf\\udce9: 1 \\xb1 2, \\u2588\\u2588 \\u2264 3\n"


def test_a_tilde_is_the_home_directory(micro_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_by_path(micro_config, out="~/run").path == tmp_path / "run"
    assert open_by_path(micro_config, out=tmp_path / "other").path == tmp_path / "other"


def test_a_path_in_any_bytes_is_a_setting(micro_config):
    loaded = load_config(micro_config, ["data.files=caf\udce9 [v1]/*.txt"])
    assert loaded.config.data.files == ["caf\udce9 [v1]/*.txt"]
    assert yaml.safe_load(loaded.resolved_yaml())["data"]["files"] == loaded.config.data.files


def test_a_folder_that_tensorboard_cannot_name_is_one_message(tmp_path):
    with pytest.raises(MoesaicError, match="not UTF-8"):
        MetricLog(tmp_path / "caf\udce9", 0)
