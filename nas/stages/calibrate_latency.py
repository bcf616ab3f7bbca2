"""Stage latency: calibrate the latency predictor on this device, or reuse this machine's earlier calibration."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from moesaic.nas.costs.latency.calibrate import NOISY, calibrate, calibration_key
from moesaic.nas.costs.latency.predictor import LatencyPredictor
from moesaic.nas.data.cache import cache_directory
from moesaic.nas.stages.directory import RunDirectory, StageDirectory, fingerprint
from moesaic.nas.stages.run import Run
from moesaic.nas.terminal.tables import write_csv
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.files import write_atomically

_FILES = ("predictor.json", "measurements.csv")


def inputs(run: Run) -> dict[str, Any]:
    """``needed`` is False where latency is calibrated for nothing: no budget line, objective or command asks for it,
    and it was not calibrated in this run before."""
    calibration = run.config.model_dump(mode="json", include={"seed", "space", "latency"}) | {
        "vocabulary": run.context.vocab_size,
        "sequence_length": run.context.sequence_length,
        "device": {**run.device.computing, "name": run.device.name, "torch": run.device.torch},
        "calibration": _key(run),
        "needed": True,
    }
    needed = run.needs_latency or RunDirectory(run.path).stage("latency", calibration).complete
    return calibration if needed else {"needed": False}


def work(run: Run, directory: StageDirectory) -> str | None:
    """Writes ``predictor.json`` and ``measurements.csv``; nothing where no budget line and no objective needs latency.

    A calibration belongs to the machine: it is cached under a key of everything it depends on. So runs on one machine
    share one predictor, and the same seed gives the same search.
    """
    if not directory.inputs["needed"]:
        run.reporter.say("latency: skipped, no budget line and no objective needs it")
        return None
    cached = calibrated(run)
    for name in _FILES:
        write_atomically(directory.path / name, lambda path, name=name: shutil.copyfile(cached / name, path))
    predictor = LatencyPredictor.load(directory.path / "predictor.json", run.device)
    measured = predictor.measured
    run.reporter.say(f"latency: calibrated {measured.date} on {predictor.device}; {predictor.describe()}")
    if measured.noise > NOISY:
        run.reporter.say(
            f"latency: repeats spread by {measured.noise:.0%} (more than {NOISY:.0%}): this machine was busy and the "
            f"calibration is not kept; when it is quiet: {run.command('latency', '--fresh')}"
        )
    return fingerprint({"coefficients": predictor.coefficients, "residuals": predictor.log_residuals})


def forget(run: Run) -> None:
    """Measure latency again, even if this machine has a calibration."""
    shutil.rmtree(_cached(run), ignore_errors=True)
    run.calibration = None
    (run.folder("latency").path / "artifact.json").unlink(missing_ok=True)
    run.forget_folders()


def known_calibration(run: Run) -> Path | None:
    """The folder of the calibration for the run's space and context that this run or this machine has, if any."""
    if run.calibration is not None:
        return run.calibration
    stage, cached = run.folder("latency"), _cached(run)
    if stage.complete and stage.inputs["needed"] and _whole(stage.path):
        return stage.path
    return cached if _whole(cached) and _reusable(cached, run) else None


def calibrated(run: Run) -> Path:
    """The same folder; measures the calibration if there is none."""
    run.calibration = known_calibration(run)
    if run.calibration is not None:
        return run.calibration
    directory = run.calibration = _cached(run)
    with run.reporter.progress("latency") as bar:

        def on_round(done: int, total: int) -> None:
            run.check_stop("latency")
            bar.update(done, total, "rounds of measurements")

        calibration = calibrate(run.space, run.context, run.config.latency, run.device, run.config.seed, on_round)
    write_csv(directory / "measurements.csv", calibration.rows)
    calibration.predictor.save(directory / "predictor.json")
    return directory


def _whole(directory: Path) -> bool:
    return all((directory / name).exists() for name in _FILES)


def _reusable(directory: Path, run: Run) -> bool:
    """Whether a cached calibration is intact, and was measured on a quiet machine: another is for its own run only."""
    try:
        return LatencyPredictor.load(directory / "predictor.json", run.device).measured.noise <= NOISY
    except MoesaicError as error:
        run.reporter.say(f"latency: the cached calibration is measured again: {error.where}: {error.problem}")
        return False


def _key(run: Run) -> str:
    return calibration_key(run.space, run.context, run.config.latency, run.device)


def _cached(run: Run) -> Path:
    return cache_directory() / "latency" / f"{_key(run)}-{run.config.seed}"
