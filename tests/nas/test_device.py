"""Processors under quotas, time that others use, and the bound on spinning threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.nas import cli, device


def control_group(tmp_path: Path, groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "cgroup", tmp_path / "mount"


@pytest.mark.parametrize(
    ("groups", "files", "processors"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4),
        ("0::/a/b\n", {"a/b/cpu.max": "800000 100000\n", "a/cpu.max": "400000 100000\n"}, 4),
        ("0::/elsewhere\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, float("inf")),
        ("0::/\n", {"cpu.max": "nonsense\n"}, float("inf")),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ("5:memory:/a\n", {"cpu/a/cpu.cfs_quota_us": "1\n", "cpu/a/cpu.cfs_period_us": "9\n"}, float("inf")),
    ],
)
def test_the_quota_is_the_smallest_of_nested_limits(
    tmp_path: Path, groups: str, files: dict[str, str], processors: float
) -> None:
    assert device._quota(*control_group(tmp_path, groups, files)) == processors


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert device._quota(tmp_path / "none", tmp_path) == float("inf")


@pytest.mark.parametrize(("quota", "used"), [(0.5, 1), (1.9, 1), (float("inf"), len(os.sched_getaffinity(0)))])
def test_threads_follow_the_quota(monkeypatch: pytest.MonkeyPatch, quota: float, used: int) -> None:
    monkeypatch.setattr(device, "_quota", lambda groups, mount: quota)
    assert device.usable_processors() == used


def test_what_others_use_is_in_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1000, 1000 + 3 * os.sysconf("SC_CLK_TCK")])
    monkeypatch.setattr(device, "_busy_ticks", lambda: next(ticks))
    monkeypatch.setattr(device.time, "sleep", lambda seconds: None)
    assert device.used_by_others(seconds=2) == 1.5


@pytest.mark.parametrize(
    ("given", "spin"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "None")],
)
def test_spinning_is_bounded_unless_the_user_decides(given: dict[str, str], spin: str) -> None:
    inherited = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import sys, moesaic, os; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], env=inherited | given, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == [spin, "False"]


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_message(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(cli.typer.Exit), cli._told():
        raise error
    assert "out of memory" in capsys.readouterr().err
