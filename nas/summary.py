"""The result of a run in one value: what ``summary.json`` holds and what a person reads at the end."""

from __future__ import annotations

import datetime
import platform
from dataclasses import asdict
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nas.costs.context import Context
from nas.costs.measure import latency_text
from nas.progress import duration
from nas.stages.run import STAGES, Run
from nas.tables import plain_table, what_costs_are_per
from nas.units import DIMENSIONS
from search_spaces import Architecture, draw
from search_spaces.files import read_json

_PACKAGES = ("torch", "numpy", "scipy", "optuna", "tokenizers", "safetensors", "pydantic")


def versions() -> dict[str, str]:
    """Python, this program, and the libraries that decide a result."""
    found = {"python": platform.python_version()}
    for name in ("moesaic", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def build_summary(run: Run) -> dict[str, Any]:
    """Everything a run found, from its artifacts."""
    stages = run.stages
    best = read_json(stages["export"].path / "best" / "figures.json")
    architecture = Architecture.from_yaml(stages["export"].path / "best" / "architecture.yaml")
    results = read_json(stages["retrain"].path / "results.json")
    searched, rivals = results[0], results[1:]
    seconds = {name: stages[name].artifact()["seconds"] for name in STAGES if stages[name].complete}
    return {
        "name": run.config.name,
        "date": datetime.date.today().isoformat(),
        "seed": run.config.seed,
        "device": str(run.device),
        "versions": versions(),
        "budget": best["budget"],
        "chosen": {
            "fingerprint": architecture.fingerprint,
            "architecture": architecture.to_dict(),
            "picture": draw(architecture).split("\n"),
            "inherited": {k: best[k] for k in ("loss", "standard_error", "perplexity", "bits_per_byte")},
            "predicted": best["predicted"],
            "measured": best["measured"],
            "latency": best["latency"],
            "retrained": searched,
        },
        "rivals": rivals,
        "search": read_json(stages["search"].path / "search.json"),
        "supernet": read_json(stages["supernet"].path / "evaluation.json"),
        "latency_predictor": {**asdict(run.predictor.accuracy), "text": run.predictor.describe()},
        "exports": [row["name"] for row in read_json(stages["export"].path / "exports.json")],
        "stage_seconds": seconds,
        "context": asdict(run.context),
    }


def verdict(summary: dict[str, Any]) -> str:
    """One honest sentence: did the search pay, by retrained losses compared sequence by sequence?"""
    searched, rivals = summary["chosen"]["retrained"], summary["rivals"]
    if not rivals:
        return "No rival was trained, so whether the search paid is not known."
    best = min(rivals, key=lambda rival: rival["loss"])
    difference, error = best["above_searched"]["mean"], best["above_searched"]["standard_error"]
    figures = (
        f"test loss {searched['loss']:.4f} against {best['loss']:.4f} of the best rival ({best['name']}), "
        f"difference {difference:+.4f} ± {error:.4f} in pairs, one training seed each"
    )
    if abs(difference) < 2 * error:
        return f"The search made no significant difference: {figures}."
    return f"The search {'paid' if difference > 0 else 'did not pay'}: {figures}."


def print_summary(console: Console, summary: dict[str, Any], run: Run) -> None:
    """The chosen architecture, its budget, its rivals, and where the files are."""
    chosen = summary["chosen"]
    console.print()
    console.print(Text("Chosen architecture", style="bold"))
    for line in chosen["picture"]:
        console.print(Text(line))
    console.print()
    console.print(_budget_table(summary["budget"]))
    console.print(_costs_table(chosen))
    console.print(Text(what_costs_are_per(Context(**summary["context"]))))
    console.print(Text(latency_text(chosen["latency"])))
    console.print()
    console.print(_rivals_table([chosen["retrained"], *summary["rivals"]]))
    console.print(Text(verdict(summary)))
    console.print()
    for name, path in (
        ("report", run.path / "report" / "index.html"),
        ("chosen model", run.path / "exports" / "best"),
        ("figures", run.path / "summary.json"),
    ):
        console.print(Text(f"{name:13} {path}"))
    seconds = summary["stage_seconds"]
    parts = [f"{name} {duration(value)}" for name, value in seconds.items()]
    console.print(Text(f"{'time':13} {duration(sum(seconds.values()))} ({', '.join(parts)})"))


def _budget_table(lines: list[dict[str, Any]]) -> Table:
    table = plain_table("Budget of the chosen architecture", "line|limit|predicted|re-measured|", "line|")
    for line in lines:
        form = DIMENSIONS[line["name"]].format
        inside = Text("inside", style="green") if line["within"] else Text("OVER", style="bold red")
        name = line["name"] if line["bind"] == "expected" else f"{line['name']} (worst case)"
        table.add_row(name, form(line["limit"]), predicted_text(line), form(line["measured"]), inside)
    return table


def predicted_text(line: dict[str, Any]) -> str:
    """The predicted cost of a budget line, and what the line binds where that is more."""
    form = DIMENSIONS[line["name"]].format
    sure = f" (below {form(line['bound'])} with confidence {line['confidence']:.4g})" if line["confidence"] else ""
    return form(line["predicted"]) + sure


def _costs_table(chosen: dict[str, Any]) -> Table:
    table = plain_table("Its costs", "cost|predicted|measured", "cost")
    for name, dimension in DIMENSIONS.items():
        table.add_row(name, dimension.format(chosen["predicted"][name]), dimension.format(chosen["measured"][name]))
    return table


def _rivals_table(results: list[dict[str, Any]]) -> Table:
    first = results[0]
    start = "scratch" if first["init"] == "scratch" else "inherited weights"
    title = f"Retrained alike ({first['steps']} steps from {start}), judged on the test split"
    table = plain_table(title, "model|loss|ppl|bits/byte|FLOPs|latency|active|budget", "model|budget")
    best = min(result["loss"] for result in results)
    for result in results:
        over = [line["name"] for line in result["budget"] if not line["within"]]
        costs = (
            DIMENSIONS[name].format(result["measured"][name]) for name in ("flops", "latency", "active_parameters")
        )
        table.add_row(
            result["name"],
            Text(f"{result['loss']:.4f}", style="bold" if result["loss"] == best else ""),
            f"{result['perplexity']:.2f}",
            f"{result['bits_per_byte']:.3f}",
            *costs,
            Text(f"OVER {', '.join(over)}", style="red") if over else Text("inside", style="green"),
        )
    return table
