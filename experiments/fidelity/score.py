"""Score judges of architectures against the ground truth: supernets, trivial proxies, and predictors that correct them.

python experiments/fidelity/score.py small|gpu     writes result.json and result.md in the variant's folder, and the figure
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from truth import HERE, read_rows

from nas.ranking import agreement, bootstrap
from nas.summary import versions
from search_spaces import Architecture
from search_spaces.files import write_json, write_text

NEAR = 0.1
"""Two members are of one FLOP band when their FLOPs differ by at most this share."""
SPLITS = 200
FINAL = 0.1


@dataclass(frozen=True)
class Truth:
    """Of each member, [n]: ``losses`` on the test split by seed [seeds, n], and what the model cost when measured."""

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
        """[n] whether a member is of the narrow band."""
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
    """Kendall's tau over the pairs of nearly equal FLOPs alone: concordant less discordant ones, over all."""
    near = np.abs(np.log(flops[:, None] / flops[None, :])) <= np.log1p(NEAR)
    pairs = np.triu(near, 1)
    agree = np.sign(judged[:, None] - judged[None, :]) * np.sign(truth[:, None] - truth[None, :])
    return float(agree[pairs].mean())


def assess(judged: np.ndarray, truth: Truth, against: np.ndarray | None = None) -> dict[str, Any]:
    """Agreement with the truth overall, in the band, and over pairs of nearly equal FLOPs."""
    loss = truth.loss if against is None else against
    band = truth.band

    def near(index: np.ndarray) -> float:
        with np.errstate(all="ignore"):
            return near_tau(judged[index], loss[index], truth.flops[index])

    low, high = bootstrap(near, len(loss))
    return {
        "all": asdict(agreement(judged, loss)),
        "band": asdict(agreement(judged[band], loss[band])),
        "near": {"tau": near_tau(judged, loss, truth.flops), "tau_low": low, "tau_high": high},
    }


def features(truth: Truth, inherited: np.ndarray | None) -> np.ndarray:
    """[n, columns] what a correction of the inherited loss may use: it and the coarse shape of the architecture."""
    columns = [np.log(truth.flops), np.log(truth.parameters)]
    if inherited is not None:
        stacks = [a.decoder for a in truth.architectures]
        columns += [inherited, np.array([len(s.layers) for s in stacks]), np.log([s.width for s in stacks])]
    return np.stack(columns, 1)


def ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray, strength: float = 0.1) -> np.ndarray:
    """Ridge regression on standardised columns (Hoerl and Kennard 1970)."""
    mean, scale = x.mean(0), x.std(0) + 1e-9
    x, new = (x - mean) / scale, (new - mean) / scale
    weights = np.linalg.solve(x.T @ x + strength * len(x) * np.eye(x.shape[1]), x.T @ (y - y.mean()))
    return y.mean() + new @ weights


def corrected(x: np.ndarray, truth: Truth, runs: int) -> dict[str, float]:
    """Mean tau, over random splits, of a ridge regression on ``runs`` stand-alone losses, on the members it did not
    see, overall and over near pairs."""
    rng, found = np.random.default_rng(0), []
    for _ in range(SPLITS):
        order = rng.permutation(len(truth.loss))
        train, test = order[:runs], order[runs:]
        seed = rng.integers(len(truth.losses))  # a correction has one training per member to learn from
        predicted = ridge(x[train], truth.losses[seed, train], x[test])
        tau = stats.kendalltau(predicted, truth.loss[test]).statistic
        found.append((tau, near_tau(predicted, truth.loss[test], truth.flops[test])))
    overall, near = np.nanmean(np.array(found), 0)
    return {"runs": runs, "tau": float(overall), "near": float(near)}


def change_row(name: str, seeds: list[dict[str, Any]], base: dict[int, np.ndarray], truth: Truth) -> dict[str, Any]:
    """One change of the supernet: means over its seeds, and its difference to the base with the same seed."""
    losses = [np.array(row["losses"]) for row in seeds]
    scores = [assess(loss, truth) for loss in losses]
    pairs = [(loss, base[row["seed"]]) for row, loss in zip(seeds, losses, strict=True) if row["seed"] in base]

    def gain(index: np.ndarray) -> float:
        where = truth.loss[index], truth.flops[index]
        return float(np.mean([near_tau(mine[index], *where) - near_tau(other[index], *where) for mine, other in pairs]))

    def mean(*keys: Any) -> float:
        values = []
        for score in scores:
            for key in keys:
                score = score[key]
            values.append(score)
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


def ablation_rows(folder: Path, truth: Truth) -> list[dict[str, Any]]:
    by_change: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(folder / "ablation.jsonl"):
        by_change.setdefault(row["change"], []).append(row)
    base = {row["seed"]: np.array(row["losses"]) for row in by_change.get("base", [])}
    return [change_row(name, seeds, base, truth) for name, seeds in by_change.items()]
