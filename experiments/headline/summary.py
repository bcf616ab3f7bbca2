"""Results of the trainings: each model's mean loss, its difference to the searched one, tables and figure.

All tests of the searched model against another are one family, whatever the text and the budget: Holm's procedure
corrects their p-values together.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.common import Row, markdown, read_rows
from moesaic import DIMENSIONS, Difference, MoesaicError, holm, mean_interval, read_value, write_value

SEARCHED = "searched"
COLOURS = {"searched": "#0072b2", "random": "#cc79a7", "uniform": "#d55e00", "dense": "#009e73"}
"""By kind, from the colour-blind safe palette of Okabe and Ito."""
NOTE = (
    "Of a kind that was trained more than once the model of least mean test loss is shown, so the choice is in its own "
    "favour; `searched` is the one that the tool ships, chosen before any training. Differences are paired by seed, "
    "with a 95 % Student interval over seeds, not corrected and without the chance in the choice of the test text; "
    "positive: worse than the searched model. p is of the paired t-test over seeds, Holm-corrected for all tests in "
    "this table, and decides the verdict. FLOPs are per token, by measured routing; both costs were measured before "
    "training."
)


LEVEL = 0.05


def verdict(mean: float, p_value: float | None) -> str:
    """Verdict by the ``mean`` of another model's loss minus the searched model's, and its corrected p-value."""
    if p_value is None:
        return "one seed says nothing"
    if p_value >= LEVEL:
        return "no significant difference"
    return "paid" if mean > 0 else "did not pay"


def above(losses: np.ndarray, reference: np.ndarray) -> Row:
    """The mean by which ``losses`` [seeds] exceed the ``reference`` with the same seeds, its interval and p-value."""
    difference = Difference.of((losses - reference)[:, None])
    several = len(losses) > 1
    return {
        "mean": difference.mean,
        "interval": (difference.low, difference.high) if several else None,
        "p_value": difference.p_value if several else None,
    }


def correct(results: list[Row]) -> None:
    """Give every difference to the searched model its Holm-corrected p-value and its verdict."""
    tests = [row["above"][SEARCHED] for one in results for row in one["models"] if row["kind"] != SEARCHED]
    known = [test for test in tests if test["p_value"] is not None]
    for test, p_value in zip(known, holm(np.array([test["p_value"] for test in known])), strict=True):
        test["corrected_p_value"] = float(p_value)
    for test in tests:
        test["verdict"] = verdict(test["mean"], test.get("corrected_p_value"))


def known_interval(values: np.ndarray) -> tuple[float, float] | None:
    return mean_interval(values) if len(values) > 1 else None


def compare(models: list[Row], trainings: list[Row]) -> list[Row]:
    """A row per model under one budget, over the seeds that all models were trained with; no rows without such seeds.

    ``models`` are ``{kind, rank, fingerprint, ...}``; those without a rank were not trained. ``trainings`` are
    ``{fingerprint, seed, test_loss, costs, ...}``.
    """
    members = [row for row in models if row["rank"]]
    by_member: dict[str, dict[int, Row]] = {row["fingerprint"]: {} for row in members}
    for training in trainings:
        by_member.get(training["fingerprint"], {})[training["seed"]] = training
    seeds = sorted(set.intersection(*(set(found) for found in by_member.values())))
    if not seeds:
        return []

    def values(member: Row, key: str) -> np.ndarray:
        return np.array([by_member[member["fingerprint"]][seed][key] for seed in seeds])

    kinds = list(dict.fromkeys(row["kind"] for row in members))
    named = {SEARCHED: next(row for row in members if row["kind"] == SEARCHED and row["rank"] == 1)}
    for kind in kinds:
        same = [row for row in members if row["kind"] == kind]
        name = f"{kind}, best of {len(same)}" if len(same) > 1 else kind
        named[name] = min(same, key=lambda row: values(row, "test_loss").mean())
    references = {name: values(row, "test_loss") for name, row in named.items() if row["kind"] == SEARCHED}
    compared = []
    for name, member in named.items():
        losses = values(member, "test_loss")
        trained = [by_member[member["fingerprint"]][seed] for seed in seeds]
        compared.append(
            {
                "name": name,
                **{key: member[key] for key in ("kind", "rank", "fingerprint", "inherited_loss", "costs", "status")},
                "seeds": seeds,
                "losses": losses.tolist(),
                "mean": float(losses.mean()),
                "interval": known_interval(losses),
                "bits_per_byte": float(values(member, "bits_per_byte").mean()),
                "flops_after_training": max(training["costs"]["flops"] for training in trained),
                "above": {other: above(losses, reference) for other, reference in references.items() if other != name},
            }
        )
    return compared


def collect(folder: Path) -> Row:
    """The result over all data sets in ``folder`` and the folders in it."""
    files = [file for pattern in ("*.models.json", "*/*.models.json") for file in sorted(folder.glob(pattern))]
    if not files:
        raise MoesaicError(
            "no models are chosen yet", where=str(folder), nearest="python -m experiments.headline.run stdlib"
        )
    results = []
    for file in files:
        facts = read_value(file, dict)
        trainings = read_rows(file.parent / f"{facts['dataset']}.jsonl")
        for cost, budget in facts["budgets"].items():
            same = [row for row in trainings if row["settings"] == budget["settings"]]
            over = [row["kind"] for row in budget["models"] if not row["rank"]]
            results.append(
                {
                    "dataset": facts["dataset"],
                    "budget": cost,
                    "limit": budget["limit"],
                    "refused_over_budget": {kind: over.count(kind) for kind in dict.fromkeys(over)},
                    "models": compare(budget["models"], same),
                    **{key: facts[key] for key in ("device", "context", "versions", "date", "steps", "trials")},
                    "training_hours": sum(row["seconds"] for row in same) / 3600,
                }
            )
    results = [result for result in results if result["models"]]
    correct(results)
    return {"note": NOTE, "results": results}


def difference_text(row: Row, reference: str) -> str:
    found = row["above"].get(reference)
    if found is None:
        return ""
    interval = " [{:+.3f}, {:+.3f}]".format(*found["interval"]) if found["interval"] else ""
    return f"{found['mean']:+.3f}{interval}"


def tables(result: Row) -> str:
    """The result as Markdown."""
    lines = []
    for one in result["results"]:
        limit = f"{one['dataset']}, {one['budget']} ≤ {DIMENSIONS[one['budget']].format(one['limit'])}"
        best = next((row["name"] for row in one["models"][1:] if row["kind"] == SEARCHED), SEARCHED)
        for index, row in enumerate(one["models"]):
            half = f" ± {(row['interval'][1] - row['interval'][0]) / 2:.3f}" if row["interval"] else ""
            costs = [DIMENSIONS[cost].format(row["costs"][cost]) for cost in ("flops", "latency")]
            test = row["above"].get(SEARCHED, {})
            p_value = test.get("corrected_p_value")
            cells = [
                limit if index == 0 else "",
                row["name"],
                str(len(row["seeds"])),
                f"{row['mean']:.3f}{half}",
                f"{row['bits_per_byte']:.3f}",
                difference_text(row, SEARCHED),
                "" if p_value is None else f"{p_value:.3f}",
                test.get("verdict", ""),
                difference_text(row, best) if best != SEARCHED and row["kind"] != SEARCHED else "",
                *costs,
            ]
            lines.append(cells)
    made = {
        f"{one['dataset']}: supernet {one['steps']['supernet']} steps, {one['trials']} evaluations per search, "
        f"trainings {one['steps']['retrain']} steps from scratch; {one['context']}; {one['device']}; {one['date']}."
        for one in result["results"]
    }
    columns = (
        "text, budget|model|seeds|test loss|bits/byte|above searched|p|did the search pay?|"
        "above searched, best of several|FLOPs|latency"
    )
    return "\n".join([markdown(columns, lines), result["note"], "", *sorted(made), ""])


def draw(result: Row, path: Path) -> None:
    """A panel per data set and budget: every seed's loss, the mean and its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = result["results"]
    columns = min(2, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(5.6 * columns, 2.7 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for one, panel in zip(results, panels, strict=False):
        for place, row in enumerate(one["models"]):
            colour = COLOURS[row["kind"]]
            if row["interval"]:
                panel.plot(row["interval"], [place, place], color=colour, linewidth=2, alpha=0.5)
            panel.plot(row["losses"], [place] * len(row["losses"]), "o", markersize=4, color=colour, alpha=0.7)
            panel.plot(row["mean"], place, "|", markersize=16, markeredgewidth=2.5, color=colour)
        panel.axvline(one["models"][0]["mean"], color="#6b7785", linewidth=0.8, linestyle="--", zorder=0)
        panel.set_yticks(range(len(one["models"])), [row["name"] for row in one["models"]])
        panel.set_ylim(len(one["models"]) - 0.5, -0.5)
        limit = DIMENSIONS[one["budget"]].format(one["limit"])
        panel.set_title(f"{one['dataset']}, {one['budget']} ≤ {limit}", fontsize=10)
        panel.set_xlabel("test loss, nats per token", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels):
        panel.remove()
    explained = "Dots: seeds. Line: mean with 95 % interval over seeds. Left is better."
    figure.suptitle(explained, fontsize=9, color="#6b7785")
    figure.savefig(path, dpi=130)


def summarise(folder: Path, figure: Path) -> None:
    """Write result.json and result.md in ``folder``, and the figure."""
    result = collect(folder)
    if not result["results"]:
        raise MoesaicError("no budget has all models trained with a seed yet", where=str(folder))
    write_value(folder / "result.json", result)
    (folder / "result.md").write_text(tables(result), encoding="utf-8")
    draw(result, figure)
    print(tables(result))
