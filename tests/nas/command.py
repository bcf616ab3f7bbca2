"""Running the command line: in a process of its own, as a person does, or quickly in the test's own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from moesaic.nas.cli import app

_COLUMNS = {"COLUMNS": "120"}
_MAIN = "from moesaic.nas.cli import main; main()"


def start(*arguments: object, file_size_limit: int | None = None) -> subprocess.Popen[str]:
    """A running `moesaic`, one thread, output captured. ``file_size_limit`` in bytes makes larger writes fail."""
    env = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1", **_COLUMNS}

    command = [sys.executable, "-c", _MAIN, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    if file_size_limit is not None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    return process


def moesaic(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A finished `moesaic`, in this process: starting one takes longer than most commands."""
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False, env=_COLUMNS)
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def moesaic_apart(*arguments: object, file_size_limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """A finished `moesaic` in a process of its own."""
    process = start(*arguments, file_size_limit=file_size_limit)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def interrupt_when(process: subprocess.Popen[str], condition: Callable[[], bool], number: int) -> tuple[int, str]:
    """Send a signal as soon as ``condition`` holds; returns the exit status and standard error."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended before the moment came: {process.communicate()}"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.005)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
