"""The hour when a GPU is there: one command tests, checks and measures in order of value, and goes on where it stopped.

python -m experiments.gpu.run [KEY=VALUE ...] [--minutes 9] [--only STEP] [--out FOLDER] [--work FOLDER] [--small]

Repeat the command until it says that every step is done. A step that is cut off by its time continues in the next call;
one that failed runs again. Each leaves its results in OUT as it ends, and OUT/steps.json says how each went. KEY=VALUE
changes the run behind the headline's row (headline.yaml), such as data.files=FOLDER. Neither Ray nor Optuna is needed.
``--small`` runs every step in small on the CPU, to show that it works.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from experiments.common import Row, parser_of, run_script, today
from moesaic import read_value, write_value

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GRACE = 45.0
"""Seconds that a step gets to save its work after its time."""
SMALL = (
    "device.device=cpu",
    "data={kind: stdlib, vocab_size: 300, sequence_length: 16}",
    "space=tiny",
    "budget={flops: 70%}",
    "supernet={steps: 4, batch_size: 4, warmup_steps: 1}",
    "latency={batch_size: 2, models: 8, repeats: 3}",
    "search={sampler: random, trials: 4, population: 4, evaluation_windows: 4}",
    "fidelity={check: 0}",
    "retrain={steps: 2, batch_size: 4, warmup_steps: 1, evaluation_windows: 4}",
)
"""Changes that make the headline's run, and the fidelity experiment, a matter of seconds."""


@dataclass(frozen=True)
class Step:
    """``command``: arguments of Python, with OUT and WORK for the folders. ``small``: what is added for a small run;
    ``changes``: whether KEY=VALUE settings are added. ``keeps``: files in WORK, and their names as copies in OUT."""

    name: str
    minutes: float
    command: str
    small: tuple[str, ...] = ("--small",)
    changes: bool = False
    keeps: dict[str, str] = field(default_factory=dict)

    def arguments(self, out: Path, work: Path, small: bool, changes: Sequence[str]) -> list[str]:
        folders = {"OUT": str(out), "WORK": str(work)}
        words = [_replaced(word, folders) for word in shlex.split(self.command)]
        return [sys.executable, *words, *(changes if self.changes else ()), *(self.small if small else ())]


def _replaced(word: str, folders: dict[str, str]) -> str:
    first, slash, rest = word.partition("/")
    return folders.get(first, first) + slash + rest


def _stage(name: str, command: str, keeps: dict[str, str] | None = None) -> Step:
    """Stages of the run that gives the headline's row."""
    words = f"-m moesaic {command} experiments/gpu/headline.yaml --out WORK/run"
    return Step(name, 9, words, SMALL, changes=True, keeps=keeps or {})


STEPS = (
    Step("tests", 8, "-m pytest -q -p no:cacheprovider tests/kernels -m 'gpu or not gpu'", ("-k", "test_activations")),
    Step("checks", 4, "-m experiments.gpu.checks --out OUT/checks.json"),
    Step("kernels", 9, "experiments/kernels/gpu.py --out OUT/kernels.json", ("--smoke",)),
    _stage("latency", "latency", {"run/latency/predictor.json": "latency.json"}),
    _stage("supernet", "supernet"),
    _stage("search", "search"),
    _stage("headline", "run", {"run/summary.json": "headline.json"}),
    Step(
        "fidelity",
        9,
        "-m experiments.fidelity.truth gpu --lanes 1 --out WORK/fidelity",
        ("--most", "1", *(change for change in SMALL if not change.startswith(("space", "budget")))),
        keeps={"fidelity/truth.jsonl": "fidelity.jsonl"},
    ),
)
"""In order of value. Those from ``latency`` to ``headline`` are one run, whose model has 50M active parameters."""


def run_step(step: Step, arguments: list[str], log: Path, seconds: float) -> Row:
    """Run a step for at most ``seconds``; it is then asked to stop (SIGTERM), and killed after ``GRACE``."""
    started, stopped = time.perf_counter(), False
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as file:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            stopped = True
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    state = "done" if code == 0 else "stopped" if stopped else "failed"
    tail = log.read_text(errors="replace").splitlines()[-15:]
    return {
        "step": step.name,
        "state": state,
        "seconds": round(time.perf_counter() - started, 1),
        "date": today(),
        "device": _device(),
        "tail": tail if state != "done" else tail[-1:],
    }


def _device() -> str:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{name}, torch {torch.__version__}"


def go(steps: Sequence[Step], out: Path, work: Path, minutes: float, small: bool, changes: Sequence[str]) -> list[Row]:
    """Run the steps that are not done, as far as the time reaches; the rows of steps.json."""
    record = out / "steps.json"
    known: dict[str, Row] = {row["step"]: row for row in read_value(record, list)} if record.exists() else {}
    end = time.monotonic() + 60 * minutes
    for step in steps:
        left = end - time.monotonic()
        if known.get(step.name, {}).get("state") == "done":
            continue
        if left <= 0:
            break
        print(
            f"{step.name}: {known.get(step.name, {}).get('state', 'first time')}, {left / 60:.1f} minutes left",
            flush=True,
        )
        arguments = step.arguments(out, work, small, changes)
        row = run_step(step, arguments, out / f"{step.name}.log", min(60 * step.minutes, left))
        for source, name in step.keeps.items():
            if (work / source).exists():
                shutil.copyfile(work / source, out / name)
        known[step.name] = row
        write_value(record, list(known.values()))
        print(f"{step.name}: {row['state']} after {row['seconds']} s", *row["tail"], sep="\n  ", flush=True)
    return list(known.values())


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="changes of headline.yaml")
    parser.add_argument("--minutes", type=float, default=9.0, help="time of this call")
    parser.add_argument("--only", choices=[step.name for step in STEPS], help="one step")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu", help="folder of runs and weights")
    parser.add_argument("--small", action="store_true", help="every step in small, on the CPU")
    chosen = parser.parse_intermixed_args()
    out, work = chosen.out.resolve(), chosen.work.resolve()
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    steps = [step for step in STEPS if chosen.only in (None, step.name)]
    rows = go(steps, out, work, chosen.minutes, chosen.small, chosen.changes)
    done = [row["step"] for row in rows if row["state"] == "done"]
    left = [step.name for step in steps if step.name not in done]
    print(f"{len(done)} steps done; to go: {', '.join(left)}" if left else "every step is done")


if __name__ == "__main__":
    run_script(main)
