"""Score judges of architectures against the ground truth: supernets, trivial proxies, and predictors that correct them.

python -m experiments.fidelity.score small|gpu     writes result.json and result.md
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import Row, markdown, parser_of, read_rows, run_script
from experiments.fidelity.truth import HERE
from moesaic import (
    Architecture,
    Correction,
    Judged,
    agreement,
    correction_features,
    kendall_tau,
    versions,
    write_value,
)

NEAR = 0.1
"""Two members are a near pair if their FLOPs differ by at most this share."""
SPLITS = 200
RESAMPLES = 2000
TRAININGS = (8, 12, 16, 24)


@dataclass(frozen=True)
class Truth:
    """The ground truth of n members: ``losses`` [seeds, n] on the test split, and measured costs [n]."""

    architectures: list[Architecture]
    strata: list[str]
    losses: np.ndarray
    flops: np.ndarray
    parameters: np.ndarray

    @property
    def loss(self) -> np.ndarray:
        return self.losses.mean(0)

    @property
    def band(self) -> np.ndarray:
        """[n] whether a member is in the narrow band."""
        return np.array([stratum.startswith("band") for stratum in self.strata])


def read_truth(folder: Path) -> Truth:
    """The members that were trained with every seed."""
    members = read_rows(folder / "members.jsonl")
    rows = {(row["member"], row["seed"]): row for row in read_rows(folder / "truth.jsonl")}
    seeds = sorted({seed for _, seed in rows})
    missing = [m["member"] for m in members if any((m["member"], seed) not in rows for seed in seeds)]
    assert not missing, f"members {missing} are not trained with every seed yet"

    def table(key: str) -> np.ndarray:
        return np.array([[rows[m["member"], seed][key] for m in members] for seed in seeds])

    return Truth(
        [Architecture.from_dict(m["architecture"]) for m in members],
        [m["stratum"] for m in members],
        table("test_loss"),
        table("flops").mean(0),
        table("parameters").mean(0),
    )


def near_tau(judged: np.ndarray, truth: np.ndarray, flops: np.ndarray) -> float:
    """Kendall's tau over the pairs of nearly equal FLOPs only: (concordant - discordant) / all. Pairs with equal true
    loss, such as a member drawn twice by a bootstrap, do not count; NaN without pairs."""
    near = np.abs(np.log(flops[:, None] / flops[None, :])) <= np.log1p(NEAR)
    order = np.sign(truth[:, None] - truth[None, :])
    pairs = np.triu(near, 1) & (order != 0)
    agree = np.sign(judged[:, None] - judged[None, :]) * order
    return float(agree[pairs].mean()) if pairs.any() else float("nan")


def bootstrap(statistic: Callable[[np.ndarray], float], count: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron 1979) of ``statistic``, a function of the drawn indices into ``count``
    members. It is about other members, not about another seed of the supernet or of the truth."""
    rng = np.random.default_rng(0)
    values = np.array([statistic(rng.integers(0, count, count)) for _ in range(RESAMPLES)])
    values = values[np.isfinite(values)]
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def assess(judged: np.ndarray, truth: Truth, against: np.ndarray | None = None) -> Row:
    """Agreement with the truth overall, in the band, and over pairs of nearly equal FLOPs."""
    loss = truth.loss if against is None else against
    band = truth.band

    def near(index: np.ndarray) -> float:
        return near_tau(judged[index], loss[index], truth.flops[index])

    low, high = bootstrap(near, len(loss))
    return {
        "all": asdict(agreement(judged, loss)),
        "band": asdict(agreement(judged[band], loss[band])),
        "near": {"tau": near_tau(judged, loss, truth.flops), "tau_low": low, "tau_high": high},
    }


def columns(truth: Truth, inherited: np.ndarray) -> np.ndarray:
    """[n, columns] the features of each member for the tool's correction, the inherited loss first."""
    rows = zip(truth.architectures, inherited, truth.flops, truth.parameters, strict=True)
    return correction_features([Judged(architecture, *values) for architecture, *values in rows])


def corrected(x: np.ndarray, truth: Truth, runs: int) -> dict[str, float]:
    """Means over random splits: the tool's correction is fitted to ``runs`` stand-alone losses of one seed and judged
    on the other members by tau overall and over near pairs, and by regret overall and in the band."""
    rng, found = np.random.default_rng(0), []
    for _ in range(SPLITS):
        order = rng.permutation(len(truth.loss))
        train, test = order[:runs], order[runs:]
        seed = rng.integers(len(truth.losses))
        predicted, loss, band = (
            Correction(x[train], truth.losses[seed, train]).predict(x[test]),
            truth.loss[test],
            truth.band[test],
        )
        near = near_tau(predicted, loss, truth.flops[test])
        found.append(
            (
                kendall_tau(predicted, loss),
                near,
                first_regret(predicted, loss),
                first_regret(predicted[band], loss[band]),
            )
        )
    return dict(zip(("tau", "near", "regret", "band_regret"), np.nanmean(np.array(found), 0).tolist(), strict=True))


def first_regret(judged: np.ndarray, truth: np.ndarray) -> float:
    """By how much the true loss of the judge's first choice exceeds the best, relative to the best."""
    return float(truth[judged.argmin()] / truth.min() - 1)


def change_row(name: str, seeds: list[Row], base: dict[int, np.ndarray], truth: Truth) -> Row:
    """One change of the supernet: means over seeds, and the difference to the base with the same seeds."""
    losses = [np.array(row["losses"]) for row in seeds]
    scores = [assess(loss, truth) for loss in losses]
    pairs = [(loss, base[row["seed"]]) for row, loss in zip(seeds, losses, strict=True) if row["seed"] in base]

    def gain(index: np.ndarray) -> float:
        where = truth.loss[index], truth.flops[index]
        return float(np.mean([near_tau(mine[index], *where) - near_tau(other[index], *where) for mine, other in pairs]))

    def mean(*keys: Any) -> float:
        values: list[Any] = [reduce(getitem, keys, score) for score in scores]
        return float(np.mean(values))

    everything = np.arange(len(truth.loss))
    return {
        "change": name,
        "seeds": len(seeds),
        "seconds": float(np.median([row["seconds"] for row in seeds])),
        "tau": mean("all", "tau"),
        "rho": mean("all", "rho"),
        "near": mean("near", "tau"),
        "band": mean("band", "tau"),
        "regret": mean("all", "regret", 1),
        "band_regret": mean("band", "regret", 1),
        "band_regret_3": mean("band", "regret", 3),
        "inherited": float(np.mean(losses)),
        "gain": gain(everything) if pairs else None,
        "gain_interval": bootstrap(gain, len(truth.loss)) if pairs and name != "base" else None,
    }


def ablation_rows(folder: Path, truth: Truth) -> list[Row]:
    by_change: dict[str, list[Row]] = {}
    for row in read_rows(folder / "ablation.jsonl"):
        by_change.setdefault(row["change"], []).append(row)
    base = {row["seed"]: np.array(row["losses"]) for row in by_change.get("base", [])}
    return [change_row(name, seeds, base, truth) for name, seeds in by_change.items()]


def correction_rows(folder: Path, truth: Truth, change: str) -> list[Row]:
    """How well a few stand-alone trainings correct the ranking: from costs alone, with the coarse shape added, and with
    the inherited losses of ``change`` (mean over its seeds) added."""
    inherited = [np.array(row["losses"]) for row in read_rows(folder / "ablation.jsonl") if row["change"] == change]
    rows = []
    for runs in TRAININGS:
        every = [columns(truth, losses) for losses in inherited]
        both = [corrected(x, truth, runs) for x in every]
        rows.append(
            {
                "runs": runs,
                "costs": corrected(every[0][:, 1:3], truth, runs),
                "shape": corrected(every[0][:, 1:], truth, runs),
                "inherited": {key: float(np.mean([row[key] for row in both])) for key in both[0]},
            }
        )
    return rows


def proxies(truth: Truth) -> dict[str, np.ndarray]:
    """Judges without training. The combination is a regression on both, each member predicted from the others."""
    costs = np.stack([np.log(truth.flops), np.log(truth.parameters)], 1)
    return {
        "more FLOPs": -truth.flops,
        "more parameters": -truth.parameters,
        "FLOPs and parameters": Correction(costs, truth.loss).left_out(),
    }


def ceiling(truth: Truth) -> Row:
    """One seed of the ground truth judged by another: the ceiling, reached by a judge as good as a training."""
    first, second = truth.losses[:2]
    noise = float((first - second - (first - second).mean()).std(ddof=1) / 2**0.5)
    return {
        **assess(first, truth, second),
        "seed_deviation": noise,
        "spread": float(truth.loss.std(ddof=1)),
        "band_spread": float(truth.loss[truth.band].std(ddof=1)),
    }


def tables(result: Row) -> str:
    """The result as Markdown."""
    judges = {"one seed of the truth by the other": result["ceiling"], **result["proxies"]}
    return (
        markdown(
            "judge|tau, all|tau, near pairs|tau, band|rho, all|regret, all|regret, band|band, best of 3",
            [
                [
                    name,
                    *(_interval(j[key]) for key in ("all", "near", "band")),
                    f"{j['all']['rho']:.2f}",
                    *(f"{j[where]['regret'][k]:.1%}" for where, k in (("all", 1), ("band", 1), ("band", 3))),
                ]
                for name, j in judges.items()
            ],
        )
        + "\n"
        + markdown(
            "change of the supernet|seeds|tau, all|tau, near pairs|difference to base, interval over members alone|"
            "tau, band|rho, all|regret, all|regret, band|band, best of 3|mean inherited loss|seconds",
            [
                _change_cells(row)
                for row in sorted(result["changes"], key=lambda r: (r["change"] != "base", -r["near"]))
            ],
        )
        + "\n"
        + markdown(
            "stand-alone trainings|costs, tau|near pairs|and shape, tau|near pairs|and inherited loss, tau|near pairs|"
            "regret, all|regret, band",
            [
                [
                    str(row["runs"]),
                    *(f"{row[judge][key]:.2f}" for judge in ("costs", "shape", "inherited") for key in ("tau", "near")),
                    *(f"{row['inherited'][key]:.1%}" for key in ("regret", "band_regret")),
                ]
                for row in result["corrections"]
            ],
        )
    )


def _interval(judge: Row) -> str:
    return f"{judge['tau']:.2f} [{judge['tau_low']:.2f}, {judge['tau_high']:.2f}]"


def _change_cells(row: Row) -> list[str]:
    difference = ""
    if row["gain_interval"]:
        low, high = row["gain_interval"]
        difference = f"{row['gain']:+.2f} [{low:+.2f}, {high:+.2f}]"
    taus = [f"{row[key]:.2f}" for key in ("band", "rho")]
    regrets = [f"{row[key]:.1%}" for key in ("regret", "band_regret", "band_regret_3")]
    start = [row["change"], str(row["seeds"]), f"{row['tau']:.2f}", f"{row['near']:.2f}", difference]
    return [*start, *taus, *regrets, f"{row['inherited']:.3f}", f"{row['seconds']:.0f}"]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("variant", choices=("small", "gpu"))
    folder = HERE / parser.parse_args().variant
    truth = read_truth(folder)
    changes = ablation_rows(folder, truth)
    trainings = read_rows(folder / "truth.jsonl")
    result = {
        "date": max(row["date"] for row in trainings),
        "device": trainings[0]["device"],
        "versions": versions(),
        "members": len(truth.loss),
        "band_members": int(truth.band.sum()),
        "seeds": len(truth.losses),
        "training_hours": sum(row["seconds"] for row in trainings) / 3600,
        "ceiling": ceiling(truth),
        "proxies": {name: assess(marks, truth) for name, marks in proxies(truth).items()},
        "changes": changes,
        "corrections": correction_rows(folder, truth, "base"),
    }
    write_value(folder / "result.json", result)
    (folder / "result.md").write_text(tables(result), encoding="utf-8")
    print(tables(result))


if __name__ == "__main__":
    run_script(main)
