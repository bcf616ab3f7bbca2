"""How good is the latency predictor on models that it has not seen? Calibrate, then measure new models.

python -m experiments.latency.run prefill|decode    calibrates on space small and measures 120 new models: a result file
python -m experiments.latency.run figure            draws both results
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from experiments.common import DOCS, Row, facts, parser_of, run_script
from moesaic import (
    TERMS,
    Accuracy,
    Architecture,
    Context,
    Device,
    DeviceConfig,
    LatencyConfig,
    LatencyPredictor,
    LayerUse,
    Pricer,
    Series,
    Survey,
    Timer,
    calibrate,
    choose_device,
    fit,
    flops,
    model_terms,
    random_passes,
    read_value,
    write_value,
)
from moesaic.search_spaces import load_space, preset_source

HERE = Path(__file__).parent
CONTEXTS = {"prefill": Context(1024, 128, 8), "decode": Context(1024, 512, 8, phase="decode")}
SPACE = load_space(preset_source("small"))
CALIBRATED, MODELS = 80, 120
CONFIDENCES = (0.8, 0.9, 0.95)


def measure(
    architectures: list[Architecture], context: Context, device: Device, predictor: LatencyPredictor, rounds: int
) -> tuple[Survey, np.ndarray, list[list[LayerUse]]]:
    """A survey, its times at the speed of the calibration, and the use of each model's layers."""
    passes = random_passes(architectures, context, device, seed=1)
    uses = [one.uses() for one in passes]
    anchors = random_passes(
        [anchor.architecture for anchor in predictor.anchors],
        context,
        device,
        predictor.anchor_seed,
        [anchor.vocab_size for anchor in predictor.anchors],
    )
    survey = Survey(list(map(Series, passes)), list(map(Series, anchors)), Timer.of(device.kind), Random(1))
    survey.measure(rounds)
    then = np.array([anchor.milliseconds for anchor in predictor.anchors])
    scale = float(np.exp(np.log(then / survey.anchor_milliseconds()).mean()))
    return survey, survey.milliseconds() * scale, uses


def new_models(seed: int) -> list[Architecture]:
    rng = Random(f"{seed}/new models")
    return [SPACE.sample_balanced(rng) for _ in range(MODELS)]


def judge(phase: str, seed: int, rounds: int) -> Row:
    context = CONTEXTS[phase]
    device = choose_device(DeviceConfig(device="cpu"))
    config = LatencyConfig(phase=context.phase, batch_size=context.batch_size, models=CALIBRATED, repeats=rounds)
    calibration = calibrate(SPACE, context, config, device, seed)
    predictor = calibration.predictor
    new = new_models(seed)
    started = time.perf_counter()
    survey, measured, uses = measure(new, context, device, predictor, rounds)
    seconds = time.perf_counter() - started

    depths = np.array([len(architecture.layers) for architecture in new])
    predicted = np.array([predictor.predict(a, use) for a, use in zip(new, uses, strict=True)])
    pricer = Pricer(context)
    even = np.array([predictor.predict(a, pricer.expected_uses(a)) for a in new])
    ratios = measured / predicted
    coverage = {}
    for confidence in CONFIDENCES:
        interval = predictor.interval(confidence)
        coverage[str(confidence)] = {
            "share": float(((interval.low <= ratios) & (ratios <= interval.high)).mean()),
            "low": interval.low,
            "high": interval.high,
        }
    drift = survey.summary(seconds, 0, None)
    return {
        "phase": phase,
        "context": str(context),
        "space": SPACE.name,
        "seed": seed,
        **facts(device),
        "calibration": {
            "models": config.models,
            "fitted": len(predictor.log_residuals),
            "measurements": predictor.measured.measurements,
            "seconds": predictor.measured.seconds,
            "noise": predictor.measured.noise,
            "raw_noise": predictor.measured.raw_noise,
            "machine": [predictor.measured.fastest, predictor.measured.slowest],
            "remeasured": predictor.measured.remeasured,
            "held_out": vars(predictor.accuracy),
            "coefficients": dict(zip(TERMS, predictor.coefficients, strict=True)),
        },
        "new_models": {
            "models": MODELS,
            "seconds": seconds,
            "noise": drift.noise,
            "raw_noise": drift.raw_noise,
            "machine": [drift.fastest, drift.slowest],
            "figure_error": float(np.median([figure.error for figure in survey.figures()])),
            "predictor": vars(Accuracy.of(predicted, measured, depths)),
            "coverage": coverage,
        },
        "baselines": baselines(calibration.rows, context, survey, new, uses, measured, even, depths),
        "rows": [
            {"fingerprint": a.fingerprint, "layers": len(a.layers), "predicted_ms": p, "measured_ms": m}
            for a, p, m in zip(new, predicted.tolist(), measured.tolist(), strict=True)
        ],
    }


def baselines(
    calibrated: list[dict[str, float | str]],
    context: Context,
    survey: Survey,
    new: list[Architecture],
    uses: list[list[LayerUse]],
    measured: np.ndarray,
    even: np.ndarray,
    depths: np.ndarray,
) -> dict[str, dict[str, Any]]:
    """The same new models predicted by simpler methods, to show what each part of the method contributes.
    ``calibrated`` has a row per model of the calibration."""
    fitted = [row for row in calibrated if row["kind"] == "model"]

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in fitted])

    terms = np.stack([column(name) for name in TERMS], axis=1)
    new_terms = np.stack([model_terms(a, use, context) for a, use in zip(new, uses, strict=True)])
    raw_fit = fit(terms, column("raw_ms"))
    raw = np.array([np.median(case.milliseconds) for case in survey.cases])
    work = np.array([flops(a, use, context) for a, use in zip(new, uses, strict=True)])
    by_depth = {depth: column("measured_ms")[column("layers") == depth].mean() for depth in set(column("layers"))}
    return {
        "FLOPs x constant, fitted to the new models themselves": vars(
            Accuracy.of(work * np.median(measured / work), measured, depths)
        ),
        "mean of the depth": vars(Accuracy.of(np.array([by_depth[d] for d in depths]), measured, depths)),
        "no drift correction": vars(Accuracy.of(new_terms @ raw_fit, raw, depths)),
        "load assumed even": vars(Accuracy.of(even, measured, depths)),
    }


def draw() -> None:
    import matplotlib.pyplot as plt

    results = [read_value(HERE / f"{phase}.json", dict) for phase in CONTEXTS]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    for axis, result in zip(axes, results, strict=True):
        measured = np.array([row["measured_ms"] for row in result["rows"]])
        predicted = np.array([row["predicted_ms"] for row in result["rows"]])
        depths = np.array([row["layers"] for row in result["rows"]])
        ends = np.array([measured.min() * 0.9, measured.max() * 1.1])
        edges = result["new_models"]["coverage"]["0.95"]
        axis.fill_between(ends, ends / edges["high"], ends / edges["low"], color="#0072b2", alpha=0.15, lw=0)
        axis.plot(ends, ends, color="#6b7785", lw=1)
        for depth, colour in zip(sorted(set(depths)), ("#e69f00", "#009e73", "#0072b2"), strict=True):
            chosen = depths == depth
            axis.scatter(measured[chosen], predicted[chosen], s=16, color=colour, label=f"{depth} layers")
        good = result["new_models"]["predictor"]
        axis.set_title(
            f"{result['phase']}, {result['context']}\n{len(measured)} new models: MAPE {good['mape']:.1%}, "
            f"bias {good['bias']:+.1%}, {good['within_5_percent']:.0%} within 5 %",
            fontsize=10,
        )
        axis.set(xlabel="measured, ms", ylabel="predicted, ms", xlim=ends, ylim=ends, aspect="equal")
        axis.legend(title=f"band: 95 % interval, holds {edges['share']:.0%}", frameon=False, fontsize=9)
    figure.suptitle(f"{results[0]['device']}, {results[0]['date']}", fontsize=8, color="#6b7785")
    figure.savefig(DOCS / "latency_calibration.png", dpi=130)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=[*CONTEXTS, "figure"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.what == "figure":
        draw()
        return
    result = judge(arguments.what, arguments.seed, arguments.rounds)
    write_value(HERE / f"{arguments.what}.json", result)
    print(json.dumps({key: result[key] for key in ("calibration", "new_models", "baselines")}, indent=1))


if __name__ == "__main__":
    run_script(main)
