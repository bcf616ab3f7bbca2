"""A mixture trained with all experts on; at test time a threshold, or a number of experts, lowers its compute.

python -m experiments.dense_threshold.run [--out runs/dense-threshold] [--steps 1500] [--seeds 3]

XMoE's dense variant (arXiv 2403.18926). Losses are of the test split, FLOPs under its measured routing, milliseconds of
a prefill of 8 x 128 tokens and of a decoding step of one sequence, timed in turns. One router serves both layers; at
the FLOPs of some thresholds, the router of each layer is then searched. Run nothing else beside it.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

import moesaic
from experiments.common import Row, do_stage, facts, markdown, parser_of, run_script
from experiments.turns import decoding, in_turns, prefill
from moesaic import Architecture, Run, load_search, open_run, uniform_layouts, write_value

HERE = Path(__file__).parent
WINDOWS, LENGTH, ROUNDS = 256, 128, 21
SEARCHED = (0.3, 0.5, 0.7)
"""Thresholds at whose FLOPs the routers of the layers are searched."""


def trained(seed: int, steps: int, out: Path) -> Path:
    """The folder of the model that uses all experts."""
    moesaic.run(HERE / "dense.yaml", [f"seed={seed}", f"retrain.steps={steps}"], out)
    return out / "exports" / "best"


def lowered(model: Path, out: Path, *settings: str) -> Run:
    run = open_run(HERE / "threshold.yaml", [f"model.from={model}", *settings], out)
    do_stage(run, "supernet")
    return run


def members(run: Run) -> dict[str, Architecture]:
    """By the name of its router, each network with the same router in every layer, all experts first."""
    found = {}
    for member in uniform_layouts(run.space, sparse=True):
        router = next(iter(member.layers.values())).feed_forward.router
        assert router is not None
        if member in run.space:
            found[f"t = {router.threshold:g}" if router.threshold else f"top-{router.k}"] = member
    return dict(sorted(found.items(), key=lambda item: -run.pricer.expected(item[1])["flops"]))


def measured(run: Run, seed: int) -> list[Row]:
    judge, whole = run.judge("test", WINDOWS), run.pricer.expected(run.space.largest)["flops"]
    models = {name: run.supernet.extract(member).eval() for name, member in members(run).items()}
    steps = {"prefill_ms": partial(prefill, batch=8), "decode_ms": decoding}
    times = {
        key: in_turns({name: make(model, length=LENGTH) for name, model in models.items()}, ROUNDS)
        for key, make in steps.items()
    }
    rows = []
    for name, model in models.items():
        evaluation = judge(model.architecture)
        share = run.pricer.measured(model.architecture, evaluation.loads)["flops"] / whole
        row: Row = {"seed": seed, "router": name, "loss": round(evaluation.loss, 4), "flops_share": round(share, 4)}
        rows.append(row | {key: round(statistics.median(found[name]), 3) for key, found in times.items()})
    return rows


def searched(threshold: float, row: Row, model: Path, out: Path, seed: int) -> Row:
    """Loss of routers chosen per layer within the measured FLOPs of one threshold everywhere."""
    run = lowered(model, out, f"budget.flops={row['flops_share']:.2%}")
    for stage in ("latency", "search"):
        do_stage(run, stage)
    best = load_search(run.budgets[0])[1].best.architecture
    loss = run.judge("test", WINDOWS)(best).loss
    return {"seed": seed, "threshold": threshold, "uniform": row["loss"], "searched": round(loss, 4)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/dense-threshold"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    rows, searches, device = list[Row](), list[Row](), ""
    for seed in range(arguments.seeds):
        out = arguments.out / f"seed-{seed}"
        model = trained(seed, arguments.steps, out / "dense")
        run = lowered(model, out / "lowered")
        own, device = measured(run, seed), str(run.device)
        rows += own
        by_name = {row["router"]: row for row in own}
        searches += [searched(t, by_name[f"t = {t:g}"], model, out / f"searched-{t}", seed) for t in SEARCHED]
    result = {**facts(device), "steps": arguments.steps, "rows": rows, "searches": searches}
    write_value(HERE / "result.json", result, dict)
    print(table(rows))
    print(markdown("seed|threshold|uniform|searched", [[str(v) for v in row.values()] for row in searches]))


def table(rows: list[Row]) -> str:
    """Medians over seeds, by rising compute saved."""
    lines = []
    for name in dict.fromkeys(row["router"] for row in rows):
        own = [row for row in rows if row["router"] == name]
        keys = {"flops_share": ".0%", "loss": ".3f", "prefill_ms": ".2f", "decode_ms": ".2f"}
        lines.append([name, *(format(statistics.median(row[key] for row in own), form) for key, form in keys.items())])
    return markdown("router|FLOPs|loss|prefill, ms|decode, ms", lines)


if __name__ == "__main__":
    run_script(main)
