"""The run's folder: what a person put there stays, provenance is written once a stage, damage names its remedy."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from moesaic.nas.pipeline import run_stages
from moesaic.nas.report.data import read_measurements
from moesaic.nas.stages.directory import RunDirectory
from moesaic.nas.stages.provenance import OwnFiles
from moesaic.nas.stages.stage import STAGES
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.files import write_text
from tests.nas.command import moesaic, moesaic_apart
from tests.nas.run_tools import QUICK, do_stage, finish, open_run, said, without_stages


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finish_stage(run: RunDirectory, inputs: dict, files: dict[str, str], extendable: tuple[str, ...] = ()):
    """Do a stage that writes ``files``."""
    stage = run.stage("search", inputs)
    prepared = run.prepare(stage, extendable)
    for name, text in files.items():
        write_text(stage.path / name, text)
    stage.finish(1.0, False)
    return prepared


@pytest.mark.parametrize("kill", [False, True])
def test_files_of_a_person_stay_when_a_stage_is_moved_aside_again_and_again(tmp_path, kill):
    run = RunDirectory(tmp_path)
    finish_stage(run, {"n": 1}, {"log": "1", "sub/table": "1"})
    notes = {"notes.txt": b"mine", "sub/mine.txt": b"mine", "sub/deep/é.txt": b"mine", "link": b"mine"}
    for name in list(notes)[:-1]:
        (tmp_path / "search" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "search" / name).write_text("mine")
    (tmp_path / "search" / "link").symlink_to("notes.txt")
    for n in (2, 3):
        if kill:  # after the folder was made ready, before the stage ended
            run.prepare(run.stage("search", {"n": n}))
        prepared = finish_stage(run, {"n": n}, {"log": str(n)})
        assert prepared.aside is not None or kill
        here = contents(tmp_path / "search")
        assert {name: here[name] for name in notes} == notes
        assert here["log"] == str(n).encode()
        assert "sub/table" not in here
    assert contents(tmp_path / "previous" / "search-1")["sub/table"] == b"1"
    assert not set(notes) & set(contents(tmp_path / "previous" / "search-1"))


def test_an_extended_stage_keeps_its_files_and_a_persons_stay(tmp_path):
    run = RunDirectory(tmp_path)
    finish_stage(run, {"n": 1}, {"log": "1"})
    (tmp_path / "search" / "notes.txt").write_text("mine")
    assert finish_stage(run, {"n": 2}, {"log": "12"}, ("n",)).continues
    assert finish_stage(run, {"n": 3, "m": 1}, {"log": "3"}).aside is not None
    assert contents(tmp_path / "search")["notes.txt"] == b"mine"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_folder_of_a_person_in_the_place_of_a_stages_is_refused(tmp_path, kind):
    place = tmp_path / "search"
    (place / "thesis.txt" if kind == "folder" else place).parent.mkdir(exist_ok=True)
    (place / "thesis.txt" if kind == "folder" else place).write_text("mine")
    before = contents(tmp_path)
    run = RunDirectory(tmp_path)
    with pytest.raises(MoesaicError, match="was not made by this program") as caught:
        run.prepare(run.stage("search", {}))
    assert caught.value.where == str(place)
    assert contents(tmp_path) == before


def test_a_file_that_was_not_written_here_is_never_replaced(tmp_path):
    files = OwnFiles(tmp_path)
    files.write("a.json", "1")
    files.write("a.json", "2")
    assert (tmp_path / "a.json").read_text() == "2"
    (tmp_path / "a.json").write_text("1")  # an earlier state of our own
    files.write("a.json", "3")
    (tmp_path / "a.json").write_text("edited by hand")
    with pytest.raises(MoesaicError, match="not written by this program"):
        files.write("a.json", "4")
    assert (tmp_path / "a.json").read_text() == "edited by hand"


@pytest.mark.parametrize("name", ["env.json", "summary.json", "report", "exports"])
def test_a_run_refuses_a_place_that_is_taken_before_it_trains(micro_config, tmp_path, name):
    out = tmp_path / "exp1"
    place = out / name if "." in name else out / name / "mine.txt"
    write_text(place, "mine")
    run = open_run(micro_config, out)
    with pytest.raises(MoesaicError, match="was not") as caught:
        finish(run)
    assert str(caught.value.where) in (str(place), str(place.parent))
    assert place.read_text() == "mine"
    assert not (out / "supernet").exists()


def test_a_configuration_in_the_runs_folder_stays(micro_config, tmp_path):
    out = tmp_path / "exp1"
    text = "# my comment\n" + micro_config.read_text()
    write_text(out / "config.yaml", text)
    write_text(out / "notes.txt", "mine")
    run = open_run(out / "config.yaml", out)
    run_stages(run, Console(quiet=True), "supernet")
    assert (out / "config.yaml").read_text() == text
    assert (out / "notes.txt").read_text() == "mine"
    assert "config.yaml is yours and stays" in said(run)
    assert json.loads((out / "env.json").read_text())["supernet"]["configuration"]["supernet"]["steps"] == 6


def test_provenance_is_written_once_a_stage(quick_run, micro_config, tmp_path):
    out = without_stages(quick_run, tmp_path / "run", "report")
    before = contents(out)
    env = json.loads(before["env.json"])
    assert set(env) == {stage.name for stage in STAGES}
    again = moesaic_apart("report", micro_config, *QUICK, "--out", out)
    assert again.returncode == 0, again.stderr
    after = json.loads((out / "env.json").read_text())
    assert after.pop("report")["command"][0] == "report"
    assert after == {name: facts for name, facts in env.items() if name != "report"}
    finished = contents(out)
    again = moesaic("report", micro_config, *QUICK, "--out", out)
    assert again.returncode == 0, again.stderr
    assert contents(out) == finished


DAMAGED = {
    "supernet/model.safetensors": "search",
    "supernet/occupancy.json": "search",
    "supernet/artifact.json": "search",
    "search/rivals.json": "fidelity",
    "fidelity/fidelity.json": "export",
    "supernet/metrics.jsonl": "report",
    "exports/exports.json": "retrain",
}


@pytest.mark.parametrize("file", DAMAGED)
def test_a_truncated_artifact_names_the_command_that_makes_it_again(quick_run, micro_config, tmp_path, file):
    out = without_stages(quick_run, tmp_path / "my run")
    stage = DAMAGED[file]
    for later in STAGES[[one.name for one in STAGES].index(stage) :]:
        (out / later.folder_name / "artifact.json").unlink()
    path = out / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 or 1])
    if file.endswith("metrics.jsonl"):
        path.write_bytes(path.read_bytes()[:5] + b"\n")
    run = open_run(micro_config, out)
    with pytest.raises(MoesaicError) as caught:
        finish(run)
    assert str(path) in str(caught.value.where)
    remedy = str(caught.value.nearest)
    move, again = remedy.split(" && ")
    assert shlex.split(again) == ["moesaic", "run", str(micro_config), *QUICK, "--out", str(out)]
    subprocess.run(move, shell=True, check=True)
    folder = out / file.split("/")[0]
    assert not folder.exists() and Path(f"{folder}.damaged").is_dir()
    if file == "exports/exports.json":  # one of the quicker ones
        finish(open_run(micro_config, out))


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_truncated_table_of_measurements_is_told(calibration, tmp_path, keep):
    whole = (calibration / "measurements.csv").read_bytes()
    path = tmp_path / "measurements.csv"
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(MoesaicError) as caught:
        read_measurements(path)
    assert caught.value.where == str(path)


def test_the_command_for_a_missing_stage_can_be_pasted(micro_config, tmp_path):
    config = tmp_path / "my config.yaml"
    config.write_text(micro_config.read_text())
    run = open_run(config, tmp_path / "my runs" / "a")
    with pytest.raises(MoesaicError, match="which is not complete") as caught:
        do_stage(run, "search")
    assert shlex.split(str(caught.value.nearest)) == [
        "moesaic", "supernet", str(config), *QUICK, "--out", str(tmp_path / "my runs" / "a")
    ]  # fmt: skip


def test_what_a_killed_process_left_half_written_is_gone_after_the_next_start(quick_run, micro_config, tmp_path):
    out = without_stages(quick_run, tmp_path / "run", "report")
    left = [out / ".moesaic-999999999-0123abcd.tmp", out / "report" / ".moesaic-999999999-0123abcd.tmp"]
    mine = out / "report" / ".notes.tmp"
    (out / "report").mkdir()
    write_text(out / "report" / "inputs.json", "{}\n")
    for path in (*left, mine):
        path.write_text("half")
    finish(open_run(micro_config, out))
    assert not any(path.exists() for path in left)
    assert mine.exists() or (out / "previous" / "report-1" / ".notes.tmp").exists()


def test_a_file_that_may_not_be_read_is_not_called_a_failed_write(micro_config, tmp_path):
    config = tmp_path / "my.yaml"
    config.mkdir()
    result = moesaic("supernet", config, "--out", tmp_path / "run")
    assert result.returncode == 2
    assert "cannot be written" not in result.stderr and str(config) in result.stderr


def test_an_error_of_the_file_system_names_its_file(micro_config, tmp_path):
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(FileNotFoundError) as caught, run.locked():
        (tmp_path / "gone").read_bytes()
    assert caught.value.filename == str(tmp_path / "gone")
