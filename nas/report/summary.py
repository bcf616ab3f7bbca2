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

from moesaic.nas.context import Context
from moesaic.nas.costs.compliance import Status, over_text, refused_text, worst_status
from moesaic.nas.costs.measure import latency_text
from moesaic.nas.exports.folder import BEST
from moesaic.nas.stages.run import STAGES, Run
from moesaic.nas.stages.run_search import search_folder
from moesaic.nas.terminal.progress import duration
from moesaic.nas.terminal.tables import plain_table, what_costs_are_per
from moesaic.nas.training.single import half_interval
from moesaic.nas.trust.sentences import sentences
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import Architecture, draw
from moesaic.search_spaces.files import read_json

_STYLES: dict[Status, str] = {"inside": "green", "within tolerance": "yellow", "over": "bold red"}
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
    best = read_json(stages["export"].path / BEST / "figures.json")
    architecture = Architecture.from_yaml(stages["export"].path / BEST / "architecture.yaml")
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
            "refused": best["refused"],
            "latency": best["latency"],
            "retrained": searched,
        },
        "rivals": rivals,
        "search": read_json(search_folder(run) / "search.json"),
        "supernet": read_json(stages["supernet"].path / "evaluation.json"),
        "latency_predictor": {**asdict(run.predictor.accuracy), "text": run.predictor.describe()},
        "trust": read_json(stages["fidelity"].path / "fidelity.json"),
        "exports": [row["name"] for row in read_json(stages["export"].path / "exports.json")],
        "stage_seconds": seconds,
        "context": asdict(run.context),
    }


def verdict(summary: dict[str, Any]) -> str:
    """One honest sentence: did the search pay, by losses retrained with the same seeds, in pairs?

    It made no significant difference exactly where the 95 % interval of the difference contains 0.
    """
    searched, rivals = summary["chosen"]["retrained"], summary["rivals"]
    if not rivals:
        return "No rival was trained, so whether the search paid is not known."
    best = min(rivals, key=lambda rival: rival["loss"])
    above = best["above_searched"]
    many = above["seeds"] > 1
    figures = (
        f"{'mean ' if many else ''}test loss {searched['loss']:.4f} against {best['loss']:.4f} of the best rival "
        f"({best['name']}), difference {above['mean']:+.4f} with a 95 % interval of {above['low']:+.4f} to "
        f"{above['high']:+.4f} over "
        + (f"{above['seeds']} training seeds, in pairs" if many else "sequences, in pairs, one training seed each")
    )
    if above["low"] <= 0 <= above["high"]:
        return f"The search made no significant difference: {figures}."
    return f"The search {'paid' if above['low'] > 0 else 'did not pay'}: {figures}."


def over_sentence(summary: dict[str, Any]) -> str | None:
    """What must be said first when the chosen model is over its budget; None when it is not."""
    over = over_text(summary["budget"])
    return over and f"{over}. No candidate kept the budget; this one exceeds it least."


def print_summary(console: Console, summary: dict[str, Any], run: Run) -> None:
    """The chosen architecture, its budget, its rivals, and where the files are."""
    chosen = summary["chosen"]
    console.print()
    console.print(Text("Chosen architecture", style="bold"))
    for line in chosen["picture"]:
        console.print(Text(line))
    console.print()
    console.print(_budget_table(summary["budget"]))
    if over := over_sentence(summary):
        console.print(Text(over, style=_STYLES["over"]))
    if refused := refused_text(chosen["refused"]):
        console.print(Text(refused, style=_STYLES["within tolerance"]))
    console.print(_costs_table(chosen))
    console.print(Text(what_costs_are_per(Context(**summary["context"]))))
    console.print(Text(latency_text(chosen["latency"])))
    console.print()
    console.print(_rivals_table([chosen["retrained"], *summary["rivals"]]))
    console.print(Text(verdict(summary)))
    console.print()
    console.print(Text("Trust in the ranking", style="bold"))
    for sentence in sentences(summary["trust"]):
        console.print(Text(sentence))
    console.print()
    for name, path in (
        ("report", run.path / "report" / "index.html"),
        ("chosen model", run.path / "exports" / BEST),
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
        name = line["name"] if line["bind"] == "expected" else f"{line['name']} (worst case)"
        table.add_row(
            name, form(line["limit"]), predicted_text(line), form(line["measured"]), _status_text(line["status"])
        )
    return table


def _status_text(status: Status, lines: str = "") -> Text:
    name = "OVER" if status == "over" else status
    return Text(f"{name} {lines}".strip(), style=_STYLES[status])


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
    seeds = len(first["runs"])
    alike = f"{first['steps']} steps from {start}" + (f", mean and 95 % interval of {seeds} seeds" if seeds > 1 else "")
    title = f"Retrained alike ({alike}), judged on the test split"
    table = plain_table(title, "model|loss|ppl|bits/byte|FLOPs|latency|active|budget", "model|budget")
    best = min(result["loss"] for result in results)
    for result in results:
        status = worst_status(result["budget"])
        lines = [line["name"] for line in result["budget"] if line["status"] == status != "inside"]
        half = half_interval(result)
        loss = f"{result['loss']:.4f}" + (f" ± {half:.4f}" if half is not None else "")
        costs = (
            DIMENSIONS[name].format(result["measured"][name]) for name in ("flops", "latency", "active_parameters")
        )
        table.add_row(
            result["name"],
            Text(loss, style="bold" if result["loss"] == best else ""),
            f"{result['perplexity']:.2f}",
            f"{result['bits_per_byte']:.3f}",
            *costs,
            _status_text(status, ", ".join(lines)),
        )
    return table
