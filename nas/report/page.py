"""The page of a report: one HTML file that opens without a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from plotly.offline import get_plotlyjs

from moesaic.nas.costs.compliance import margin_text, predicted_text, refused_text, worst_status
from moesaic.nas.costs.measure import latency_text
from moesaic.nas.exports.figures import BEST, RetrainedModel, training_text
from moesaic.nas.report.data import Model, batch_text, budget_text, cost_name, per_text
from moesaic.nas.report.figures import breakdown_figure, history_figure, latency_figure, pareto_figure, training_figure
from moesaic.nas.report.findings import Findings
from moesaic.nas.report.html import flag, paragraph, plot, section, table
from moesaic.nas.report.pictures import HATCH, architecture_svg, pixels_per_neuron
from moesaic.nas.report.ranking_section import trust_section
from moesaic.nas.report.source_section import source_section
from moesaic.nas.report.summary import Chosen, Summary, over_sentence, source_sentence, verdict
from moesaic.nas.tasks import Metric
from moesaic.nas.terminal.progress import duration
from moesaic.nas.trust.sentences import flops_sentence
from moesaic.nas.units import DIMENSIONS

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""Content policy: the page must not load anything from outside."""
_COMPARED = {
    "flops": "FLOPs per token",
    "latency": "latency",
    "active_parameters": "active parameters",
    "parameters": "parameters",
}
"""Costs of retrained models, with the heads of their columns."""


def build_page(findings: Findings) -> str:
    """The whole page as text."""
    summary = findings.summary
    sections = {
        "result": ("Result", _result(findings)),
        "front": ("Pareto front", _front(findings)),
        **({"source": ("Trained model", source_section(summary, findings.sparsity))} if findings.sparsity else {}),
        "trust": ("Trust", trust_section(summary.trust, summary.judged_in)),
        "architectures": ("Architectures", _architectures(findings)),
        "compute": ("Compute by layer", _compute(findings)),
        "search": ("Search", _search(findings)),
        "training": ("Training", _training(findings)),
        "predictions": ("Predictions", _predictions(findings)),
        "reproduce": ("Reproduce", _reproduce(findings)),
    }
    name = escape(summary.name)
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, (title, _) in sections.items())
    about = paragraph(f"{summary.date} · {summary.device} · seed {summary.seed}", "muted")
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name} · Moesaic</title>\n<style>\n{style}</style>",
            f"<script>{get_plotlyjs()}</script>\n</head>\n<body>",
            f"{HATCH}<header><h1>{name}</h1>{about}</header>\n<nav><div>{links}</div></nav>\n<main>",
            *(section(key, title, parts) for key, (title, parts) in sections.items()),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _result(findings: Findings) -> Iterator[str]:
    summary, context = findings.summary, findings.context
    chosen = summary.chosen
    if over := over_sentence(summary):
        yield paragraph(over, "verdict bad")
    if of_source := source_sentence(summary):
        yield paragraph(of_source, "verdict")
    yield paragraph(verdict(summary), "verdict")
    yield f"<h3>Costs of the retrained model, exports/{BEST}</h3>"
    yield table(
        ("cost", "limit", "predicted", "measured", "budget"),
        [_cost_row(findings, cost, chosen) for cost in chosen.measured],
    )
    yield paragraph(
        "Predicted without running the model; measured on the retrained model of the first seed, with routing on the "
        f"test split, FLOPs and active parameters of a budget line on the most expensive seed. Latency and memory are "
        f"for one forward pass over a {batch_text(context)} on this device.",
        "muted",
    )
    if refused := refused_text(chosen.refused):
        yield paragraph(refused, "warn")
    yield paragraph(latency_text(chosen.latency), "muted")
    results = [chosen.retrained, *summary.rivals]
    costs = [cost for cost in _COMPARED if cost in chosen.measured]
    yield "<h3>Retrained alike, evaluated on the test split</h3>"
    yield table(
        (
            "model",
            f"loss, {summary.unit}",
            *(metric.title for metric in summary.metrics),
            *(_COMPARED[cost] for cost in costs),
            "budget",
        ),
        [*(_result_row(result, summary.metrics, costs) for result in results), *_source_row(summary, costs)],
        chosen=0,
    )
    per = f", latency {per_text('latency', context)}" if "latency" in costs else ""
    yield paragraph(
        f"Training: {training_text(results[0].init, results[0].steps)}, {_about_seeds(results[0])}{per}. With "
        f"inherited weights, as in the search, the searched model has a test loss of {chosen.inherited.loss:.4f}.",
        "muted",
    )


def _about_seeds(result: RetrainedModel) -> str:
    seeds = len(result.runs)
    if seeds == 1:
        alike = "with one seed and the same batches; " if result.steps else ""
        return (
            f"{alike}± is the standard error over sequences of {result.tokens} test tokens, far larger than that of a "
            "difference between models on the same sequences. Costs are measured"
        )
    return (
        f"once with each of {seeds} seeds, all on the same batches; figures are means, ± half the 95 % interval of the "
        "mean over seeds (Student). Costs are measured on the first seed's model; for the budget, FLOPs and active "
        "parameters are those of the most expensive seed"
    )


def _cost_row(findings: Findings, cost: str, chosen: Chosen) -> tuple:
    form = DIMENSIONS[cost].format
    name = f"{cost_name(cost)}, {per_text(cost, findings.context)}"
    line = next((line for line in findings.summary.budget if line.name == cost), None)
    if line is None:
        return name, "none", form(chosen.predicted[cost]), form(chosen.measured[cost]), ""
    worst = " (worst case)" if line.bind == "worst" else ""
    return (
        name,
        form(line.limit),
        predicted_text(line) + worst,
        form(line.measured),
        flag(margin_text(line), line.status),
    )


def _result_row(result: RetrainedModel, metrics: Sequence[Metric], costs: Sequence[str]) -> tuple:
    return (
        result.name,
        f"{result.loss:.4f} ± {result.error:.4f}",
        *(metric.format(result.metrics[metric.name]) for metric in metrics),
        *(DIMENSIONS[cost].format(result.measured[cost]) for cost in costs),
        flag(budget_text(result.budget), worst_status(result.budget)),
    )


def _source_row(summary: Summary, costs: Sequence[str]) -> Iterator[tuple]:
    """The row of the trained model that the run starts from, if it does."""
    if (source := summary.source) is not None:
        metrics = (metric.format(source.metrics[metric.name]) for metric in summary.metrics)
        measured = (DIMENSIONS[cost].format(source.measured[cost]) for cost in costs)
        yield "trained model", f"{source.loss:.4f} ± {source.standard_error:.4f}", *metrics, *measured, ""


def _front(findings: Findings) -> Iterator[str]:
    search = findings.summary.search
    refused = sum(point.kind == "refused" for point in findings.points)
    yield paragraph(
        f"{search.counts['evaluated']} architectures were evaluated with weights inherited from the supernet, "
        f"{search.over_budget_when_measured} of them were over budget when their routing was "
        f"measured, and {refused} others were refused before evaluation because their predicted costs were over "
        f"budget. Members of the front of {' and '.join(_names(findings.objectives))}: {len(findings.result.front)}."
    )
    unit = findings.summary.judged_in
    yield plot("pareto", pareto_figure(findings.points, findings.budget, findings.context, findings.default_cost, unit))
    yield paragraph(
        "Costs use the routing measured in the evaluation; for refused architectures and rivals, the expected "
        "routing. Latency is always predicted. Bars are ± one standard error over sequences.",
        "muted",
    )
    costs = [line.name for line in findings.exports[0].budget]
    yield "<h3>Exported, with inherited weights</h3>"
    yield table(
        ("export", "trial", f"test loss, {unit}", *(f"{cost_name(cost)}, measured" for cost in costs), "budget"),
        [
            (
                row.name,
                str(row.trial),
                f"{row.loss:.4f} ± {row.standard_error:.4f}",
                *(DIMENSIONS[line.name].format(line.measured) for line in row.budget),
                flag(budget_text(row.budget), worst_status(row.budget)),
            )
            for row in findings.exports
        ],
        chosen=0,
    )


def _architectures(findings: Findings) -> Iterator[str]:
    models = [*findings.models, *findings.exported]
    scale = pixels_per_neuron(models)
    yield paragraph(
        "One row per layer: query heads / key-value heads, then one tile per expert. The width of a tile is the "
        "expert's number of neurons, on one scale. Hatched: the shared expert, used by every token. The dark bar shows "
        "the neurons that a token is expected to use."
    )
    for model in models:
        yield f"<h3>{escape(model.name)}</h3>{paragraph(_about(model), 'muted')}"
        yield f'<div class="scroll">{architecture_svg(model, scale)}</div>'


def _about(model: Model) -> str:
    architecture = model.architecture
    active, total = (DIMENSIONS[c].format(model.costs[c]) for c in ("active_parameters", "parameters"))
    widths = ", ".join(f"width {stack.width}" for stack in architecture.stacks.values())
    return (
        f"{widths}, {architecture.backbone.activation}, {architecture.fingerprint}; "
        f"{DIMENSIONS['flops'].format(model.costs['flops'])} per token, {active} of {total} parameters active per token"
    )


def _compute(findings: Findings) -> Iterator[str]:
    yield paragraph("Expected FLOPs per token, forward, by part of each layer; the vocabulary layer last.")
    yield plot("compute-plot", breakdown_figure(findings.models, findings.context))


def _search(findings: Findings) -> Iterator[str]:
    rivals = [point for point in findings.points if point.kind == "rival"]
    search = findings.summary.search
    yield paragraph(
        f"Sampler {search.sampler}. {search.acceptance:.1%} of random architectures of the "
        f"space are inside the budget. The hypervolume ({' × '.join(_names(findings.objectives))}) "
        "uses a reference point of this search: do not compare it with other searches."
    )
    yield plot("history", history_figure(findings.history, rivals, findings.summary.judged_in))
    if additivity := search.additivity:
        tau = "" if additivity["tau"] is None else f", Kendall's tau {additivity['tau']:.2f}"
        yield paragraph(
            f"Sums of scores predicted the losses of the {additivity['solutions']} solutions of the integer programme "
            f"with a mean absolute error of {additivity['mean_absolute_error']:.3f} "
            f"(mean error {additivity['mean_error']:+.3f}{tau})."
        )


def _training(findings: Findings) -> Iterator[str]:
    yield paragraph(
        "Losses on single training batches. Dotted: slices of the supernet. Solid: models retrained alone, "
        "with the first seed."
    )
    yield plot("curves", training_figure(findings.curves, findings.summary.unit))


def _predictions(findings: Findings) -> Iterator[str]:
    if predictor := findings.summary.latency_predictor:
        yield paragraph(f"Latency: {predictor.text}.")
        yield plot("latency", latency_figure(findings.measurements, findings.context))
    else:
        yield paragraph("Latency was not calibrated: no budget line and no objective needs it.")
    yield paragraph(flops_sentence(findings.summary.trust.flops))


def _reproduce(findings: Findings) -> Iterator[str]:
    summary = findings.summary
    seconds = summary.stage_seconds
    yield paragraph(f"Seed {summary.seed} for every stage. Device: {summary.device}.")
    stages = [*seconds.items(), ("total", sum(seconds.values()))]
    yield '<div class="columns"><div><h3>Versions</h3>'
    yield table(("package", "version"), list(summary.versions.items()))
    yield "</div><div><h3>Time of each stage</h3>"
    yield table(("stage", "h:mm:ss"), [(name, duration(value)) for name, value in stages])
    yield f"</div></div><h3>Configuration, resolved</h3><pre>{escape(findings.configuration)}</pre>"


def _names(objectives: tuple[str, ...]) -> list[str]:
    return [name if name == "loss" else cost_name(name) for name in objectives]
