"""Fails unless a run directory holds every figure that a finished run promises."""

import json
import math
import sys
from pathlib import Path

COSTS = ("flops", "latency", "parameters", "active_parameters", "memory")
LOSSES = ("loss", "standard_error")
METRICS = ("perplexity", "bits_per_byte")


def check(run: Path) -> list[str]:
    """Names of the figures that are missing, not finite, or of the wrong sign."""
    summary = json.loads((run / "summary.json").read_text())
    chosen = summary["chosen"]
    figures = {
        **{
            f"budget.{line['name']}.{key}": line[key]
            for line in summary["budget"]
            for key in ("limit", "predicted", "measured")
        },
        **{f"chosen.{kind}.{cost}": chosen[kind][cost] for kind in ("predicted", "measured") for cost in COSTS},
        **{f"inherited.{name}": chosen["inherited"][name] for name in LOSSES},
        **{f"inherited.{name}": chosen["inherited"]["metrics"][name] for name in METRICS},
        **{
            f"{model['name']}.{name}": model[name]
            for model in (chosen["retrained"], *summary["rivals"])
            for name in LOSSES
        },
        **{
            f"{model['name']}.{name}": model["metrics"][name]
            for model in (chosen["retrained"], *summary["rivals"])
            for name in METRICS
        },
        **{
            f"stage_seconds.{name}": summary["stage_seconds"].get(name)
            for name in ("supernet", "latency", "search", "fidelity", "export", "retrain")
        },
        "latency_predictor.mape": summary["latency_predictor"]["accuracy"]["mape"],
        "search.hypervolume": summary["search"]["hypervolume"],
        "trust.levels": summary["trust"]["front"][-1]["level"],
        **{f"trust.{row['name']}": row["standard_error"] for row in summary["trust"]["front"]},
        "search.acceptance": summary["search"]["acceptance"],
    }
    fast = {"stage_seconds.latency"}  # this machine may have been calibrated before
    wrong = [
        name
        for name, value in figures.items()
        if not isinstance(value, int | float)
        or not math.isfinite(value)
        or value < 0
        or (value == 0 and name not in fast)
    ]
    wrong += [
        f"budget.{line['name']} predicted over its limit"
        for line in summary["budget"]
        if line["predicted"] > line["limit"]
    ]
    shipped = json.loads((run / "exports" / "best" / "figures.json").read_text())
    if shipped["loss"] != chosen["retrained"]["runs"][0]["loss"]:
        wrong.append("exports/best is another model than the one that was judged")
    names = {model["name"] for model in summary["rivals"]}
    wrong += [f"rival {name}" for name in ("uniform", "dense") if name not in names]
    files = [
        "report/index.html",
        "report/pareto.png",
        "report/pareto.svg",
        "report/pareto.csv",
        "config.yaml",
        "env.json",
        "search/trials.jsonl",
        "search/journal.log",
        "fidelity/fidelity.json",
        "latency/measurements.csv",
    ]
    exported = ["architecture.yaml", "config.json", "model.safetensors", "tokenizer.json", "retrain.yaml", "README.md"]
    files += [f"exports/{name}/{file}" for name in summary["exports"] for file in exported]
    loadable = ["architecture.yaml", "config.json", "model.safetensors", "tokenizer.json"]
    files += [
        f"retrain/{model['name']}/seed-{one['seed']}/{file}"
        for model in (chosen["retrained"], *summary["rivals"])
        for one in model["runs"]
        for file in loadable
    ]
    return wrong + [file for file in files if not (run / file).is_file() or not (run / file).stat().st_size]


if __name__ == "__main__":
    missing = check(Path(sys.argv[1]))
    if missing:
        sys.exit("missing or impossible: " + ", ".join(missing))
