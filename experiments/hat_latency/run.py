"""How well can HAT's published latencies be predicted, and how much of the error is drift of the machine?

The measurements are of HAT (Wang et al., ACL 2020), https://github.com/mit-han-lab/hardware-aware-transformers, folder
latency_dataset: one row per network, in measuring order. Results are means over random 80/10/10 splits.

python -m experiments.hat_latency.run CSV... [--json] [--seeds 5] [--out FOLDER for result.json and the figure]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import facts, markdown, parser_of, run_script
from experiments.hat_latency.predictors import (
    Drifting,
    Rows,
    anchored,
    boosting,
    depth_mean,
    hat_mlp,
    nnls,
    read,
    scikit_learn,
)
from moesaic import Accuracy, DeviceConfig, Interval, choose_device, fit, leave_one_out, versions, write_value

TRAINING_ROWS = (25, 50, 100, 400, 1600)
CALIBRATION = 40  # whole models from which an interval is made, as in a calibration of Moesaic


@dataclass(frozen=True)
class Split:
    """Results of one random split: a record per predictor, and the predictions for the figure."""

    accuracy: dict[str, dict[str, Any]]
    coverage: dict[str, float]
    mape_by_rows: dict[str, dict[int, float]]
    drift_share: float
    measured: np.ndarray
    predicted: dict[str, np.ndarray]


def random_split(rows: Rows, seed: int) -> Split:
    """All predictors on one split into 80 % training, 10 % validation and 10 % test rows."""
    rng = np.random.default_rng(seed)
    order, tenth = rng.permutation(len(rows)), len(rows) // 10
    train, validation, test = (rows.take(part) for part in np.split(order, [8 * tenth, 9 * tenth]))
    rest = rows.take(order[8 * tenth :])
    ours = Drifting.of(train)
    both = {
        "HAT's MLP": hat_mlp(train, rest, seed),
        "boosting": boosting(train, validation, rest, seed),
        "depth mean": depth_mean(train, rest),
        "NNLS": nnls(train, rest),
        "ours": ours.at_typical_speed(rest),
        "boosting, order known": boosting(train, validation, rest, seed, order_known=True),
        "ours, order known": ours.at_time(rest),
    }
    predicted = {name: values[tenth:] for name, values in both.items()}
    accuracy = {name: asdict(Accuracy.of(values, test.latency, test.depths)) for name, values in predicted.items()}
    at_one_speed = test.latency * ours.typical / ours.drift.factor(test.times)
    accuracy["ours, drift taken out"] = {
        **asdict(Accuracy.of(predicted["ours"], at_one_speed, test.depths)),
        "tau_within_depth_if_exact": _ceiling(predicted["ours"], at_one_speed, test.depths, rng),
    }
    unknown, known = (
        np.square(np.log(predicted[name] / test.latency)).mean() for name in ("ours", "ours, order known")
    )
    coverage = {
        name: _coverage(both[name], validation.latency, test.latency, rng)
        for name in ("NNLS", "ours", "ours, order known")
    }
    coverage["60 rows, each left out once"] = _coverage_left_out(train.take(np.arange(60)), test)
    by_rows = _mape_by_rows(train, validation, test, seed)
    return Split(accuracy, coverage, by_rows, 1 - known / unknown, test.latency, predicted)


def _ceiling(predicted: np.ndarray, measured: np.ndarray, depths: np.ndarray, rng: np.random.Generator) -> float | None:
    """Tau within depth of exact predictions under the same noise: the errors are permuted 20 times."""
    noise = measured / predicted
    dealt = [Accuracy.of(predicted, predicted * rng.permutation(noise), depths).tau_within_depth for _ in range(20)]
    return _mean(dealt)


def _mape_by_rows(train: Rows, validation: Rows, test: Rows, seed: int) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for count in TRAINING_ROWS:
        if count > len(train):
            break
        few = train.take(np.arange(count))
        ours = Drifting.of(few)
        for name, values in {
            "boosting": boosting(few, validation, test, seed),
            "NNLS": nnls(few, test),
            "ours": ours.at_typical_speed(test),
            "ours, order known": ours.at_time(test),
        }.items():
            found.setdefault(name, {})[count] = Accuracy.of(values, test.latency).mape
    return found


def _coverage(predicted: np.ndarray, validation: np.ndarray, test: np.ndarray, rng: np.random.Generator) -> float:
    """Share of the test rows inside the 95 % interval from 40 validation rows, mean over 50 draws.

    ``predicted`` has the validation rows first, then the test rows.
    """
    residuals = np.log(validation / predicted[: len(validation)])
    ratio = test / predicted[len(validation) :]
    draws = [rng.choice(len(residuals), min(CALIBRATION, len(residuals)), replace=False) for _ in range(50)]
    return float(np.mean([_share_inside(Interval.of(residuals[drawn]), ratio) for drawn in draws]))


def _coverage_left_out(calibration: Rows, test: Rows) -> float:
    """The same for a fit without drift to a few rows, with the interval of their leave-one-out errors."""
    left_out = leave_one_out(calibration.terms, calibration.latency)
    predicted = test.terms @ fit(calibration.terms, calibration.latency)
    return _share_inside(Interval.of(np.log(calibration.latency / left_out)), test.latency / predicted)


def _share_inside(interval: Interval, ratio: np.ndarray) -> float:
    low, high = interval.around(1.0)
    return float(((ratio >= low) & (ratio <= high)).mean())


def forecasts(train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
    """Accuracy on rows that were measured after all the training rows."""
    ours = Drifting.of(train)
    predicted = {
        "depth mean": depth_mean(train, test),
        "NNLS": nnls(train, test),
        "ours": ours.at_typical_speed(test),
        "ours, last speed held": ours.at_time(test),
        "ours, with anchors": anchored(train, test),
    }
    return {name: asdict(Accuracy.of(values, test.latency, test.depths)) for name, values in predicted.items()}


def chronological(rows: Rows) -> dict[str, Any]:
    """The last tenth predicted from the first eight; and each tenth from the fourth on from all rows before it."""
    tenth = len(rows) // 10
    places = np.arange(len(rows))
    last = forecasts(rows.take(places[: 8 * tenth]), rows.take(places[9 * tenth :]))
    forward = [
        forecasts(rows.take(places[: k * tenth]), rows.take(places[k * tenth : (k + 1) * tenth])) for k in range(3, 10)
    ]
    return {
        "last_tenth": last,
        "tenths_4_to_10_mape": {name: [one[name]["mape"] for one in forward] for name in last},
    }


def experiment(path: Path, seeds: int) -> tuple[dict[str, Any], Rows, list[Split]]:
    """The result of one file, and the data of the figure."""
    rows = read(path)
    splits = []
    for seed in range(seeds):
        print(f"{path.name}: split {seed + 1} of {seeds}", file=sys.stderr)
        splits.append(random_split(rows, seed))
    result = {
        "file": path.name,
        "rows": len(rows),
        "random_splits": _mean([split.accuracy for split in splits]),
        "mape_by_training_rows": _mean([split.mape_by_rows for split in splits]),
        "drift_share_of_squared_error": _mean([split.drift_share for split in splits]),
        "coverage_of_95_percent_interval": _mean([split.coverage for split in splits]),
        "chronological": chronological(rows),
    }
    return result, rows, splits


def _mean(values: list[Any]) -> Any:
    """The mean over splits, key by key in dictionaries; None if any is None. Counts are equal in all splits."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, int):
        return first
    return None if None in values else float(np.mean(values))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def tables(result: dict[str, Any]) -> str:
    """The result of one file as Markdown."""

    def percent(share: float) -> str:
        return f"{100 * share:.2f}"

    def rank(tau: float | None) -> str:
        return "-" if tau is None else f"{tau:.3f}"

    accuracy = []
    for name, of in result["random_splits"].items():
        ranks = [rank(of[key]) for key in ("spearman", "tau", "tau_within_depth")]
        accuracy.append([name, percent(of["mape"]), f"{of['rmse']:.1f}", percent(of["bias"]), *ranks])
    by_rows = result["mape_by_training_rows"]
    counts = list(by_rows["NNLS"])
    few = [[name, *(percent(errors[count]) for count in counts)] for name, errors in by_rows.items()]
    later = []
    for name, of in result["chronological"]["last_tenth"].items():
        each = result["chronological"]["tenths_4_to_10_mape"][name]
        cells = [percent(of["mape"]), percent(of["bias"]), rank(of["tau_within_depth"])]
        later.append([name, *cells, percent(float(np.mean(each))), percent(max(each))])
    exact = result["random_splits"]["ours, drift taken out"]["tau_within_depth_if_exact"]
    covered = ", ".join(f"{name} {100 * of:.1f}" for name, of in result["coverage_of_95_percent_interval"].items())
    return "\n".join(
        (
            f"{result['file']}: {result['rows']} rows, random 80/10/10 splits\n",
            markdown("predictor|MAPE %|RMSE ms|bias %|Spearman|tau|tau in depth", accuracy),
            f"Drift is {100 * result['drift_share_of_squared_error']:.0f} % of the squared log error. Order not known: "
            "a model that will be measured some day. Order known: the gaps of a table whose neighbours in time were "
            "measured; of ranks it orders the drift too. Drift taken out: architectures at one speed; an exact model "
            f"with this noise would have tau in depth {rank(exact)}.\n",
            "MAPE % by training rows\n",
            markdown("|".join(["predictor", *map(str, counts)]), few),
            "Measured later than all training rows\n",
            markdown("predictor|last tenth %|bias %|tau in depth|tenths 4-10 %|worst tenth %", later),
            f"Test rows inside the 95 % interval, %: {covered}\n",
        )
    )


def draw(found: list[tuple[dict[str, Any], Rows, list[Split]]], path: Path) -> None:
    """Predicted against measured on test rows, and the speed of the machine over measuring order, per file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(found), 2, squeeze=False, width_ratios=(1, 1.7))
    for (result, rows, splits), (scatter, order) in zip(found, axes, strict=True):
        measured = np.concatenate([split.measured for split in splits])
        for name, colour in (("ours", "#c9a227"), ("ours, order known", "#1f4e79")):
            predicted = np.concatenate([split.predicted[name] for split in splits])
            label = f"{name}: {100 * result['random_splits'][name]['mape']:.2f} %"
            scatter.plot(measured, predicted, ".", markersize=3, color=colour, alpha=0.6, label=label)
        ends = [measured.min(), measured.max()]
        scatter.plot(ends, ends, color="black", linewidth=0.8)
        scatter.set(xlabel="measured, ms", ylabel="predicted, ms", title=f"{result['file']}: test rows")
        scatter.legend(frameon=False, markerscale=3, loc="upper left")
        ours = Drifting.of(rows)
        excess = 100 * (rows.latency / ours.at_typical_speed(rows) - 1)
        order.plot(rows.times, excess, ".", markersize=2.5, color="#9aa5b1", label="measured over predicted")
        speed = 100 * (ours.drift.factor(rows.times) / ours.typical - 1)
        order.plot(rows.times, speed, color="#b3261e", linewidth=1, label="drift")
        order.axhline(0, color="black", linewidth=0.8)
        order.set(xlabel="row, in measuring order", ylabel="slower than typical, %", title="drift of the machine")
        order.legend(frameon=False, markerscale=4, loc="upper right")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="CSV")
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    parser.add_argument("--seeds", type=int, default=5, help="number of random splits (default 5)")
    parser.add_argument("--out", type=Path, help="folder for result.json and predicted_measured.png")
    chosen = parser.parse_args(arguments)
    if chosen.seeds < 1:
        parser.error("--seeds must be at least 1")
    scikit_learn()
    for path in chosen.files:
        read(path)  # an invalid file is reported before the first takes minutes
    device = choose_device(DeviceConfig(device="cpu", threads=1))
    found = [experiment(path, chosen.seeds) for path in chosen.files]
    result = {
        **facts(device),
        "versions": {**versions(), "scikit-learn": metadata.version("scikit-learn")},
        "seeds": list(range(chosen.seeds)),
        "files": [_rounded(one) for one, _, _ in found],
    }
    if chosen.out:
        write_value(chosen.out / "result.json", result)
        draw(found, chosen.out / "predicted_measured.png")
    print(json.dumps(result, indent=2) if chosen.json else "\n".join(tables(one) for one, _, _ in found))


if __name__ == "__main__":
    run_script(main)
