"""The model card of an exported model: its picture, its figures, and how they were obtained."""

from __future__ import annotations

from moesaic.nas import __version__
from moesaic.nas.costs.compliance import MeasuredLine, over_text, refused_text
from moesaic.nas.costs.measure import latency_text
from moesaic.nas.exports.figures import BEST, INHERITED_BEST, ExportFigures
from moesaic.nas.exports.huggingface.files import card_header, is_language_model, snippet
from moesaic.nas.tasks import Task
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import Architecture, draw


def model_card(architecture: Architecture, figures: ExportFigures, task: Task) -> str:
    """A README for the folder of a model of ``task``."""
    over, refused = over_text(figures.budget), refused_text(figures.refused)
    rows = [_budget_row(line) for line in figures.budget]
    costs = [
        f"| {name} | {DIMENSIONS[name].format(figures.predicted[name])} | "
        f"{DIMENSIONS[name].format(figures.measured[name])} | {DIMENSIONS[name].per} |"
        for name in figures.measured
    ]
    outputs = "states" if architecture.backbone.head == "none" else "logits"
    metrics = task.metrics + task.generation_metrics
    scores = ", ".join(f"{metric.title} {metric.format(figures.metrics[metric.name])}" for metric in metrics)
    scores += f" ({figures.signature})" if figures.signature else ""
    loads = is_language_model(architecture)
    return "\n".join(
        [
            *(card_header() if loads else []),
            f"# {figures.name}: a sparse Transformer designed by Moesaic {__version__}",
            "",
            "```",
            draw(architecture),
            "```",
            "",
            f"Weights: {figures.weights}. Their loss ({task.unit}) on the test split: {figures.loss:.4f} "
            f"(standard error {figures.standard_error:.4f} over sequences, {figures.tokens} tokens), {scores}.",
            _other_weights(figures),
            "",
            *([f"**{over}.**", ""] if over else []),
            "| budget line | limit | predicted | measured | status |",
            "|---|---|---|---|---|",
            *rows,
            "",
            *([refused, ""] if refused else []),
            "| cost | predicted | measured | |",
            "|---|---|---|---|",
            *costs,
            "",
            "FLOPs are 2 x multiply-accumulates of a forward pass, attention counted unfused; predicted from the",
            "expected load of each expert, measured from the load on the test text. Memory is the weights in float32",
            f"and the peak of activations of a pass over {figures.context} on {figures.device}.",
            "",
            latency_text(figures.latency),
            "",
            f"Largest difference of {outputs}: {_differences(figures)}.",
            "",
            "Load it with `moesaic.load(directory)`; retrain it with `moesaic retrain DIRECTORY`.",
            "",
            *(snippet(figures.name) if loads else []),
        ]
    )


def _other_weights(figures: ExportFigures) -> str:
    """What is known of the same architecture with other weights."""
    if figures.inherited is not None:
        return f"With weights inherited from the supernet, as in the search, it is {figures.inherited.loss:.4f}."
    trained = f", as in `{BEST}`" if figures.name == INHERITED_BEST else ""
    return f"Trained alone{trained}, the architecture has another loss; the run's verdict is about trained models."


def _differences(figures: ExportFigures) -> str:
    read_back = f"to itself read back from disk {figures.reload_max_logit_difference or 0:.2g}"
    if figures.slice_max_logit_difference is None:
        return read_back
    return f"to the slice of the supernet {figures.slice_max_logit_difference:.2g}, {read_back}"


def _budget_row(line: MeasuredLine) -> str:
    form, status = DIMENSIONS[line.name].format, "**OVER**" if line.status == "over" else line.status
    costs = " | ".join(form(cost) for cost in (line.limit, line.predicted, line.measured))
    return f"| {line.name} ({line.bind}) | {costs} | {status} |"
