"""Stage latency: calibrate the latency predictor on this device, or take this machine's earlier calibration."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

from moesaic.nas.costs.latency.calibrate import NOISY, calibrate, calibration_key
from moesaic.nas.costs.latency.predictor import LatencyPredictor
from moesaic.nas.data.corpus import cache_directory
from moesaic.nas.stages.directory import fingerprint
from moesaic.nas.stages.run import Run
from moesaic.search_spaces.files import write_atomically, write_text


def run_latency(run: Run, fresh: bool = False) -> None:
    """Leaves ``predictor.json`` and ``measurements.csv``.

    A calibration belongs to the machine: it is kept in the cache under everything it depends on, so that runs on
    one machine share one predictor and the same seed gives the same search. ``fresh`` measures again.
    """
    if fresh:
        shutil.rmtree(_cached(run), ignore_errors=True)
        run.calibration = None
        (run.stages["latency"].path / "artifact.json").unlink(missing_ok=True)
    with run.work("latency") as stage:
        if stage is None:
            return
        cached = calibrated(run)
        for name in ("predictor.json", "measurements.csv"):
            write_atomically(stage.path / name, lambda path, name=name: shutil.copyfile(cached / name, path))
        predictor = _load(run, stage.path / "predictor.json")
        write_text(
            stage.path / "digest",
            fingerprint({"coefficients": predictor.coefficients, "residuals": predictor.log_residuals}),
        )
        run.reporter.say(f"latency: calibrated {predictor.measured.date} on {predictor.device}; {predictor.describe()}")
        if predictor.measured.noise > NOISY:
            run.reporter.say(
                f"latency: repeats spread by {predictor.measured.noise:.0%} (more than {NOISY:.0%}): this machine was "
                "busy and the calibration is not kept; quiet it and run `moesaic latency --fresh`"
            )


def calibrated(run: Run) -> Path:
    """The folder of this machine's calibration for the run's space and context, measured now if there is none."""
    if run.calibration is not None:
        return run.calibration
    stage = run.stages["latency"]
    run.calibration = directory = stage.path if stage.complete else _cached(run)
    known = directory / "predictor.json"
    # What was measured while the machine was busy is used by the run that asked, and not kept for others.
    if known.exists() and (stage.complete or _load(run, known).measured.noise <= NOISY):
        return directory
    with run.task("latency") as task:
        calibration = calibrate(
            run.space,
            run.context,
            run.config.latency,
            run.device,
            run.config.seed,
            lambda done, total: task.update(done, total, "rounds of measurements"),
        )

    def write_rows(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(calibration.rows[0]))
            writer.writeheader()
            writer.writerows(calibration.rows)

    write_atomically(directory / "measurements.csv", write_rows)
    calibration.predictor.save(directory / "predictor.json")
    return directory


def _load(run: Run, path: Path) -> LatencyPredictor:
    return LatencyPredictor.load(path, run.device.fingerprint, str(run.device))


def _cached(run: Run) -> Path:
    key = calibration_key(run.space, run.context, run.config.latency, run.device)
    return cache_directory() / "latency" / f"{key}-{run.config.seed}"
