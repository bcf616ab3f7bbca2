"""The headline experiment: who is chosen to compete, and what is said of made-up trainings."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.nas.config import load_config
from moesaic.nas.trust.correction import Correction, Judged
from moesaic.search_spaces import MoesaicError

FOLDER = Path(__file__).parents[2] / "experiments" / "headline"
sys.path.insert(0, str(FOLDER))  # a script finds its neighbours so
contestants = importlib.import_module("contestants")
summary = importlib.import_module("summary")

LOSSES = {"first": [3.00, 3.02, 2.98], "second": [2.99, 3.03, 2.99], "worse": [3.10, 3.125, 3.08], "bad": [3.3] * 3}


def contestant(kind: str, rank: int | None, fingerprint: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "rank": rank,
        "fingerprint": fingerprint,
        "inherited_loss": 3.5,
        "costs": {"flops": 5.9e5, "latency": 7.0},
        "status": "inside" if rank else "over",
    }


def trainings(seeds: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "settings": "these",
            "fingerprint": name,
            "seed": seed,
            "test_loss": loss,
            "bits_per_byte": loss / 1.5,
            "costs": {"flops": 5.9e5 + seed},
            "seconds": 60.0,
        }
        for name, losses in LOSSES.items()
        for seed, loss in enumerate(losses[:seeds])
    ]


MEMBERS = [
    contestant("searched", 1, "first"),
    contestant("searched", 2, "second"),
    contestant("random", None, "refused"),
    contestant("random", 1, "first"),
    contestant("uniform", 1, "bad"),
    contestant("uniform", 2, "worse"),
    contestant("dense", 1, "bad"),
]


def test_an_identical_contestant_makes_no_difference_and_a_worse_one_shows_that_the_search_paid():
    rows = {row["name"]: row for row in summary.compare(MEMBERS, trainings())}
    assert list(rows) == ["searched", "searched, best of 2", "random", "uniform, best of 2", "dense"]
    same = rows["random"]["above"]["searched"]
    assert same == {"mean": 0.0, "interval": (0.0, 0.0), "verdict": "no significant difference"}
    assert rows["uniform, best of 2"]["above"]["searched"]["verdict"] == "paid"
    assert rows["uniform, best of 2"]["above"]["searched"]["mean"] == pytest.approx(0.305 / 3)
    assert summary.verdict(-0.2, -0.1) == "did not pay"


def test_the_best_of_a_kind_is_the_one_of_least_mean_test_loss():
    rows = {row["name"]: row for row in summary.compare(MEMBERS, trainings())}
    assert rows["uniform, best of 2"]["fingerprint"] == "worse"
    assert rows["searched, best of 2"]["fingerprint"] == "first"
    assert rows["dense"]["flops_after_training"] == 5.9e5 + 2


def test_only_seeds_that_everyone_was_trained_with_count():
    rows = trainings()
    partly = [row for row in rows if (row["fingerprint"], row["seed"]) != ("bad", 1)]
    assert {tuple(row["seeds"]) for row in summary.compare(MEMBERS, partly)} == {(0, 2)}
    assert summary.compare(MEMBERS, [row for row in rows if row["fingerprint"] != "bad"]) == []
    alone = summary.compare(MEMBERS, trainings(seeds=1))
    assert alone[-1]["interval"] is None
    assert alone[-1]["above"]["searched"]["verdict"] == "one seed says nothing"


def test_summary_writes_tables_and_figure_of_rows_with_the_settings_of_the_contestants(tmp_path: Path):
    facts = {
        "dataset": "made-up",
        "device": "none",
        "context": "none",
        "versions": {},
        "date": "2026-01-01",
        "steps": {"supernet": 1, "retrain": 1},
        "trials": 1,
        "budgets": {"flops": {"settings": "these", "limit": 6e5, "contestants": MEMBERS}},
    }
    (tmp_path / "made-up.contestants.json").write_text(json.dumps(facts))
    others = [{**row, "settings": "others", "test_loss": 0.0} for row in trainings()]
    lines = [json.dumps(row) for row in (*trainings(), *others)]
    (tmp_path / "made-up.jsonl").write_text("\n".join(lines) + "\n")
    summary.summarise(tmp_path, tmp_path / "figure.png")
    (result,) = json.loads((tmp_path / "result.json").read_text())["results"]
    assert result["contestants"][0]["mean"] == pytest.approx(3.0)
    assert result["refused_over_budget"] == {"random": 1}
    text = (tmp_path / "result.md").read_text()
    assert "made-up, flops ≤ 600 kFLOPs" in text
    assert "| no significant difference |" in text
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_candidates_over_the_budget_are_passed_over():
    def measure(candidate: int) -> dict[str, Any]:
        return {"candidate": candidate, "status": "over" if candidate % 2 else "inside"}

    rows = contestants.keeping("dense", range(1, 9), measure)
    assert [(row["candidate"], row["rank"]) for row in rows] == [(1, None), (2, 1), (3, None), (4, 2)]
    with pytest.raises(MoesaicError, match="no dense candidate keeps the budget"):
        contestants.keeping("dense", (1, 3), measure)


def test_only_the_best_by_a_rough_judge_are_judged_well():
    few = contestants.screened(range(200), lambda item: -float(item))
    assert few == list(range(199, 199 - contestants.FINALISTS, -1))


def test_all_kinds_are_ranked_by_the_judge_of_the_searched_ones():
    architecture = load_config(FOLDER / "stdlib.yaml").space.smallest
    judged = [Judged(architecture, 3.0 - 0.01 * n, 1e5 * (n + 1), 1e5) for n in range(8)]
    plain = contestants.ranked(judged, None)
    assert [candidate.inherited_loss for candidate in plain] == sorted(one.loss for one in judged)
    # Trained alone, the order is the other way round.
    corrected = contestants.ranked(judged, Correction.of(judged, np.arange(8) / 100))
    assert [candidate.inherited_loss for candidate in corrected] == [one.loss for one in judged]


def test_candidates_that_compute_the_same_count_once():
    architecture = load_config(FOLDER / "stdlib.yaml").space.smallest
    ranked = [contestants.Candidate(architecture, loss) for loss in (1.0, 1.0, 2.0)]
    assert contestants.distinct(ranked) == [ranked[0], ranked[2]]
