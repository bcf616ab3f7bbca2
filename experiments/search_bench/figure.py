"""Draw the missing share of the hypervolume after each evaluation: docs/search_bench.png.

python -m experiments.search_bench.figure
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments.common import DOCS, parser_of, read_rows, run_script
from experiments.search_bench.curves import shares
from experiments.search_bench.large import COUNT, best_known, read_points
from experiments.search_bench.run import CURVES, LENGTH, history_of

COLOURS = {
    "evolution": "#d55e00",
    "puzzle": "#009e73",
    "nsga2": "#0072b2",
    "tpe": "#56b4e9",
    "random": "#6b7785",
    "Optuna's NSGA-II, plain": "#0072b2",
    "Optuna's TPE, plain": "#56b4e9",
    "AutoMoE's evolution": "#cc79a7",
}
LEAST = 2e-4
"""End of the axis: a search that has found everything is drawn here."""


def draw(axis: Axes, method: str, histories: list[np.ndarray], length: int) -> None:
    """Median over seeds, and the band from the 10th to the 90th percentile."""
    whole = np.array([np.pad(h, (0, max(0, length - len(h))), mode="edge")[:length] for h in histories])
    missing = np.maximum(1 - whole, LEAST)
    count = np.arange(1, length + 1)
    low, middle, high = np.percentile(missing, (10, 50, 90), axis=0)
    style = "--" if "plain" in method else "-"
    axis.plot(count, middle, style, color=COLOURS[method], lw=2 if method == "evolution" else 1.3, label=method)
    axis.fill_between(count, low, high, color=COLOURS[method], alpha=0.12, lw=0)


def main() -> None:
    parser_of(__doc__).parse_args()
    rows, points = read_rows(CURVES), read_points()
    figure, axes = plt.subplots(1, 3, figsize=(14, 5), layout="constrained", sharey=True)
    titles = {
        "moe": "6,840 architectures: counts, sizes, routers",
        "heads": "8,736 architectures: heads, shared experts",
    }
    for axis, (table, title) in zip(axes, titles.items(), strict=False):
        for method in COLOURS:
            mine = [history_of(row) for row in rows if (row["table"], row["method"]) == (table, method)]
            if mine:
                draw(axis, method, mine, LENGTH)
        axis.set(title=title, ylabel="hypervolume missing")
    truth = best_known(points)
    for method in COLOURS:
        mine = [shares(found, truth) for (name, _), found in points.items() if name == method]
        if mine:
            draw(axes[2], method, mine, COUNT)
    axes[2].set(title="2.5e16 architectures, against the best known of all")
    for axis in axes:
        axis.set(yscale="log", xlabel="evaluations", ylim=(LEAST, 1), xlim=(0, None))
        axis.axhline(0.01, color="black", lw=0.6, ls=":")
        axis.grid(alpha=0.2)
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines() if line.get_label() in COLOURS}
    axes[2].legend(handles=[lines[method] for method in COLOURS if method in lines], fontsize=8, frameon=False)
    figure.savefig(DOCS / "search_bench.png", dpi=110)


if __name__ == "__main__":
    run_script(main)
