"""Stops in the parts of stages that keep no checkpoint: loads of experts, rivals, the front, exports."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moesaic.search_spaces import Interrupted
from tests.nas.run_tools import do_stage, only, open_run, said


@pytest.mark.parametrize(
    ("stage", "part"), [("supernet", "loads"), ("search", "rivals"), ("fidelity", "front"), ("export", "export")]
)
def test_a_stop_is_heeded_between_two_models(stage, part, quick_run: Path, micro_config: Path, tmp_path: Path):
    path = tmp_path / "run"
    shutil.copytree(quick_run, path)
    run = open_run(micro_config, path, should_stop=lambda: f"{part}: started" in said(run))
    folder = only(run).folder(stage).path
    (folder / "artifact.json").unlink()
    (folder / "exports.json").unlink(missing_ok=True)  # an export that stands is not made again
    with pytest.raises(Interrupted, match=f"stopped in {part}"):
        do_stage(run, stage)
    assert not (folder / "artifact.json").exists()
    again = open_run(micro_config, path)
    do_stage(again, stage)
    assert only(again).folder(stage).complete


def test_rivals_show_how_many_are_evaluated(quick_run: Path, micro_config: Path, tmp_path: Path):
    path = tmp_path / "run"
    shutil.copytree(quick_run, path)
    run = open_run(micro_config, path)
    (path / "search" / "artifact.json").unlink()
    do_stage(run, "search")
    first, *_, last = (line for line in said(run).splitlines() if line.startswith("rivals: ") and "/" in line)
    done, total = last.removeprefix("rivals: ").split()[0].split("/")
    assert first.startswith("rivals: 0/")
    assert done == total != "0"
