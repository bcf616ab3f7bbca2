"""Is a calibration of a large space within its time limit, and how good is it on whole models that it has not seen?

python -m experiments.latency.large [--limit SECONDS] [--models N]    space medium, vocabulary 32,000, 8 x 512 tokens
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np

from experiments.common import Row, facts, parser_of, run_script
from experiments.latency.run import measure
from moesaic import Accuracy, Context, DeviceConfig, LatencyConfig, calibrate, choose_device, write_value
from moesaic.search_spaces import load_space, preset_source

HERE = Path(__file__).parent
SPACE = load_space(preset_source("medium"))
CONTEXT = Context(32_000, 512, 8)
SEED, ROUNDS = 0, 3


def judge(limit: float, models: int) -> Row:
    """The calibration, and its errors on new models, which are timed beside its anchors in a session of their own."""
    device = choose_device(DeviceConfig(device="cpu"))
    config = LatencyConfig(batch_size=CONTEXT.batch_size, time_limit=limit)
    predictor = calibrate(SPACE, CONTEXT, config, device, SEED).predictor
    rng = Random(f"{SEED}/new models")
    new = [SPACE.sample_balanced(rng) for _ in range(models)]
    _, measured, uses = measure(new, CONTEXT, device, predictor, ROUNDS)
    predicted = np.array([predictor.predict(a, use) for a, use in zip(new, uses, strict=True)])
    depths, interval = np.array([len(a.layers) for a in new]), predictor.interval()
    ratios = measured / predicted
    return {
        **facts(device),
        "space": SPACE.name,
        "context": str(CONTEXT),
        "vocabulary": CONTEXT.vocab_size,
        "seed": SEED,
        "time_limit": limit,
        "calibration": vars(predictor.measured) | {"held_out": vars(predictor.accuracy)},
        "interval": [interval.low, interval.high],
        "new_models": vars(Accuracy.of(predicted, measured, depths)),
        "inside": float(((interval.low <= ratios) & (ratios <= interval.high)).mean()),
        "rows": [
            {"fingerprint": a.fingerprint, "layers": len(a.layers), "predicted_ms": p, "measured_ms": m}
            for a, p, m in zip(new, predicted.tolist(), measured.tolist(), strict=True)
        ],
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--limit", type=float, default=180.0)
    parser.add_argument("--models", type=int, default=8)
    arguments = parser.parse_args()
    result = judge(arguments.limit, arguments.models)
    write_value(HERE / "large.json", result)
    print({key: result[key] for key in ("calibration", "interval", "new_models", "inside")})


if __name__ == "__main__":
    run_script(main)
