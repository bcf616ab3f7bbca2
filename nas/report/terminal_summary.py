"""The summary of a run in the terminal: the chosen architecture, its budget, its rivals, and where the files are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from moesaic.nas.costs.compliance import MeasuredLine, Status, predicted_text, refused_text, worst_status
from moesaic.nas.costs.measure import latency_text
from moesaic.nas.exports.figures import BEST, training_text
from moesaic.nas.report.summary import Chosen, Summary, over_sentence, source_sentence, verdict
from moesaic.nas.terminal.progress import duration
from moesaic.nas.terminal.tables import PlainTable, plain_table, what_costs_are_per
from moesaic.nas.trust.sentences import sentences
from moesaic.nas.units import DIMENSIONS

_STYLES: dict[Status, str] = {"inside": "green", "within tolerance": "yellow", "over": "bold red"}


def print_summary(console: Console, summary: Summary, files: dict[str, Path]) -> None:
    """``files`` are named in the last lines."""
    chosen = summary.chosen
    console.print()
    console.print(Text("Chosen architecture", style="bold"))
    for line in chosen.picture:
        console.print(Text(line))
    console.print()
    console.print(_budget_table(summary.budget))
    if over := over_sentence(summary):
        console.print(Text(over, style=_STYLES["over"]))
    if refused := refused_text(chosen.refused):
        console.print(Text(refused, style=_STYLES["within tolerance"]))
    console.print(_costs_table(chosen))
    console.print(Text(what_costs_are_per(summary.context)))
    console.print(Text(latency_text(chosen.latency)))
    console.print()
    console.print(_rivals_table(summary))
    if of_source := source_sentence(summary):
        console.print(Text(of_source))
    console.print(Text(verdict(summary)))
    console.print()
    console.print(Text("Trust in the ranking", style="bold"))
    for sentence in sentences(summary.trust):
        console.print(Text(sentence))
    console.print()
    for name, path in files.items():
        console.print(Text(f"{name:13} {path}"))
    seconds = summary.stage_seconds
    parts = [f"{name} {duration(value)}" for name, value in seconds.items()]
    console.print(Text(f"{'time':13} {duration(sum(seconds.values()))} ({', '.join(parts)})"))


def _budget_table(lines: Sequence[MeasuredLine]) -> PlainTable:
    table = plain_table(f"Budget of the retrained model (exports/{BEST})", "line|limit|predicted|re-measured|", "line|")
    for line in lines:
        form = DIMENSIONS[line.name].format
        name = line.name if line.bind == "expected" else f"{line.name} (worst case)"
        table.add_row(name, form(line.limit), predicted_text(line), form(line.measured), _status_text(line.status))
    return table


def _status_text(status: Status, lines: str = "") -> Text:
    name = "OVER" if status == "over" else status
    return Text(f"{name} {lines}".strip(), style=_STYLES[status])


def _costs_table(chosen: Chosen) -> PlainTable:
    table = plain_table("Its costs", "cost|predicted|measured", "cost")
    for name, measured in chosen.measured.items():
        form = DIMENSIONS[name].format
        table.add_row(name, form(chosen.predicted[name]), form(measured))
    return table


def _rivals_table(summary: Summary) -> PlainTable:
    results, metrics, source = [summary.chosen.retrained, *summary.rivals], summary.metrics, summary.source
    first = results[0]
    seeds = len(first.runs)
    alike = training_text(first.init, first.steps) + (f", mean and 95 % interval of {seeds} seeds" if seeds > 1 else "")
    costs = {"flops": "FLOPs", "latency": "latency", "active_parameters": "active", "parameters": "parameters"}
    costs = {cost: title for cost, title in costs.items() if cost in first.measured}
    columns = ["model", "loss", *(metric.title for metric in metrics), *costs.values(), "budget"]
    title = f"Retrained alike ({alike}), evaluated on the test split; loss in {summary.unit}"
    table = plain_table(title, "|".join(columns), "model|budget")
    best = min(result.loss for result in results)
    for result in results:
        status = worst_status(result.budget)
        lines = [line.name for line in result.budget if line.status == status != "inside"]
        loss = f"{result.loss:.4f}" + (f" ± {result.half_interval:.4f}" if result.half_interval is not None else "")
        table.add_row(
            result.name,
            Text(loss, style="bold" if result.loss == best else ""),
            *(metric.format(result.metrics[metric.name]) for metric in metrics),
            *(DIMENSIONS[cost].format(result.measured[cost]) for cost in costs),
            _status_text(status, ", ".join(lines)),
        )
    if source is not None:
        scores = (f"{source.loss:.4f}", *(metric.format(source.metrics[metric.name]) for metric in metrics))
        table.add_row("trained", *scores, *(DIMENSIONS[cost].format(source.measured[cost]) for cost in costs), "")
    return table
