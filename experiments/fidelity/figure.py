"""Draw how a second seed, inherited losses and each change of the supernet agree with the ground truth.

python -m experiments.fidelity.figure small|gpu [CHANGE]     shows inherited losses of CHANGE (default: base)
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments.common import DOCS, parser_of, read_rows, run_script
from experiments.fidelity.score import read_truth
from experiments.fidelity.truth import HERE
from moesaic import read_value

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#6b7785"


def scatter(axis: Axes, judged: np.ndarray, truth: np.ndarray, band: np.ndarray, tau: str) -> None:
    axis.scatter(judged[~band], truth[~band], s=18, color=BLUE, label="over the FLOP range")
    axis.scatter(judged[band], truth[band], s=18, color=ORANGE, marker="D", label="in one FLOP band")
    axis.set_title(tau, fontsize=9)
    axis.legend(frameon=False, fontsize=8)


def draw(variant: str, change: str) -> None:
    folder = HERE / variant
    truth, result = read_truth(folder), read_value(folder / "result.json", dict)
    rows = [row for row in read_rows(folder / "ablation.jsonl") if row["change"] == change]
    inherited = np.mean([row["losses"] for row in rows], axis=0)
    chosen = next(row for row in result["changes"] if row["change"] == change)
    figure, axes = plt.subplots(1, 3, figsize=(14, 5.6), layout="constrained", width_ratios=(1, 1, 0.9))
    ceiling = result["ceiling"]
    first, second = truth.losses[:2]
    scatter(axes[0], first, second, truth.band, f"ceiling: tau {ceiling['all']['tau']:.2f}, {_near(ceiling)} near")
    axes[0].set(xlabel="stand-alone loss, seed 0", ylabel="stand-alone loss, seed 1")
    title = f"{change}: tau {chosen['tau']:.2f}, {chosen['near']:.2f} near"
    scatter(axes[1], inherited, truth.loss, truth.band, title)
    axes[1].set(xlabel="inherited loss, mean of the seeds", ylabel="stand-alone loss, mean of the seeds")
    changes = sorted(result["changes"], key=lambda row: row["near"])
    for place, row in enumerate(changes):
        low, high = row["gain_interval"] or (row["gain"], row["gain"])
        start = row["near"] - row["gain"]
        axes[2].plot([start + low, start + high], [place, place], color=GREY, lw=1)
        axes[2].plot(row["near"], place, "o", color=ORANGE if row["change"] == "base" else BLUE)
    axes[2].set_yticks(range(len(changes)), [row["change"] for row in changes], fontsize=8)
    for value, label in (
        (ceiling["near"]["tau"], "one seed"),
        (result["proxies"]["FLOPs and parameters"]["near"]["tau"], "costs"),
    ):
        axes[2].axvline(value, color=GREY, linestyle="--", lw=1)
        axes[2].text(value, -1.6, label, fontsize=8, ha="center")
    axes[2].set_ylim(-2, len(changes))
    axes[2].set_xlabel("tau over pairs of nearly equal FLOPs")
    axes[2].set_title("bars: 95 % of the difference to base", fontsize=9)
    figure.suptitle(f"{result['device']}, {result['date']}", fontsize=8, color=GREY)
    figure.savefig(DOCS / f"fidelity_{variant}.png", dpi=130)


def _near(judge: dict) -> str:
    return f"{judge['near']['tau']:.2f}"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("variant", choices=("small", "gpu"))
    parser.add_argument("change", nargs="?", default="base")
    arguments = parser.parse_args()
    draw(arguments.variant, arguments.change)


if __name__ == "__main__":
    run_script(main)
