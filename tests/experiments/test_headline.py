"""The headline experiment: which models are chosen, and what is said of made-up trainings."""

from __future__ import annotations

import json
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.common import read_rows
from experiments.headline import models, run, summary
from moesaic import Architecture, Correction, Judged, MoesaicError, load_config, read_value

LOSSES = {"first": [3.00, 3.02, 2.98], "second": [2.99, 3.03, 2.99], "worse": [3.10, 3.125, 3.08], "bad": [3.3] * 3}


def model(kind: str, rank: int | None, fingerprint: str) -> dict[str, Any]:
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
    model("searched", 1, "first"),
    model("searched", 2, "second"),
    model("random", None, "refused"),
    model("random", 1, "first"),
    model("uniform", 1, "bad"),
    model("uniform", 2, "worse"),
    model("dense", 1, "bad"),
]


def test_an_identical_model_makes_no_difference_and_a_worse_one_shows_that_the_search_paid():
    rows = {row["name"]: row for row in summary.compare(MEMBERS, trainings())}
    summary.correct([{"models": list(rows.values())}])
    assert list(rows) == ["searched", "searched, best of 2", "random", "uniform, best of 2", "dense"]
    same = rows["random"]["above"]["searched"]
    assert (same["mean"], same["interval"], same["p_value"]) == (0.0, (0.0, 0.0), 1.0)
    assert same["verdict"] == "no significant difference"
    assert rows["uniform, best of 2"]["above"]["searched"]["verdict"] == "paid"
    assert rows["uniform, best of 2"]["above"]["searched"]["mean"] == pytest.approx(0.305 / 3)
    assert summary.verdict(-0.2, 0.049) == "did not pay"


def test_every_comparison_of_the_result_is_one_of_the_tests_that_are_corrected():
    """A difference that is significant alone is not beside fourteen others."""

    def rows(*p_values: float) -> list[dict[str, Any]]:
        models = [{"kind": "dense", "above": {"searched": {"mean": 0.1, "p_value": p}}} for p in p_values]
        return [{"models": [{"kind": "searched", "above": {}}, model]} for model in models]

    def tests(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        summary.correct(results)
        return [one["models"][1]["above"]["searched"] for one in results]

    (alone,) = tests(rows(0.004))
    first, *others = tests(rows(0.004, *[0.3] * 14))
    assert (alone["verdict"], first["verdict"]) == ("paid", "no significant difference")
    assert first["corrected_p_value"] == pytest.approx(0.06)
    assert {other["corrected_p_value"] for other in others} == {1.0}


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
    summary.correct([{"models": alone}])
    assert alone[-1]["above"]["searched"]["verdict"] == "one seed says nothing"


def test_summary_writes_tables_and_figure_of_rows_with_the_settings_of_the_models(tmp_path: Path):
    facts = {
        "dataset": "made-up",
        "device": "none",
        "context": "none",
        "versions": {},
        "date": "2026-01-01",
        "steps": {"supernet": 1, "retrain": 1},
        "trials": 1,
        "budgets": {"flops": {"settings": "these", "limit": 6e5, "models": MEMBERS}},
    }
    (tmp_path / "made-up.models.json").write_text(json.dumps(facts))
    others = [{**row, "settings": "others", "test_loss": 0.0} for row in trainings()]
    lines = [json.dumps(row) for row in (*trainings(), *others)]
    (tmp_path / "made-up.jsonl").write_text("\n".join(lines) + "\n")
    summary.summarise(tmp_path, tmp_path / "figure.png")
    (result,) = json.loads((tmp_path / "result.json").read_text())["results"]
    assert result["models"][0]["mean"] == pytest.approx(3.0)
    assert result["refused_over_budget"] == {"random": 1}
    text = (tmp_path / "result.md").read_text()
    assert "made-up, flops ≤ 600 kFLOPs" in text
    assert "| no significant difference |" in text
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_candidates_over_the_budget_are_passed_over():
    def measure(candidate: int) -> dict[str, Any]:
        return {"candidate": candidate, "status": "over" if candidate % 2 else "inside"}

    rows = models.keeping("dense", range(1, 9), measure)
    assert [(row["candidate"], row["rank"]) for row in rows] == [(1, None), (2, 1), (3, None), (4, 2)]
    with pytest.raises(MoesaicError, match="no dense candidate keeps the budget"):
        models.keeping("dense", (1, 3), measure)


def test_only_the_best_by_a_rough_judge_are_judged_well():
    few = models.screened(range(200), lambda item: -float(item))
    assert few == list(range(199, 199 - models.FINALISTS, -1))


def test_all_kinds_are_ranked_by_the_judge_of_the_searched_ones():
    architecture = load_config(run.HERE / "stdlib.yaml").space.smallest
    judged = [Judged(architecture, 3.0 - 0.01 * n, 1e5 * (n + 1), 1e5) for n in range(8)]
    plain = models.ranked(judged, None)
    assert [candidate.inherited_loss for candidate in plain] == sorted(one.loss for one in judged)
    # Trained alone, the order is the other way round.
    corrected = models.ranked(judged, Correction.of(judged, np.arange(8) / 100))
    assert [candidate.inherited_loss for candidate in corrected] == [one.loss for one in judged]


def test_candidates_that_compute_the_same_count_once():
    architecture = load_config(run.HERE / "stdlib.yaml").space.smallest
    ranked = [models.Candidate(architecture, loss) for loss in (1.0, 1.0, 2.0)]
    assert models.distinct(ranked) == [ranked[0], ranked[2]]


def here(work, jobs, lanes):
    """``in_processes`` in this one."""
    for key, arguments in jobs.items():
        future = Future()
        future.set_result(work(*arguments))
        yield key, future


def test_the_whole_experiment_in_small(tmp_path: Path, micro_config: Path, monkeypatch, capsys):
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "in_processes", here)
    monkeypatch.setattr(models, "COUNTS", {"searched": 2, "random": 1, "uniform": 1, "dense": 1})
    monkeypatch.setattr(run, "COUNTS", models.COUNTS)
    (tmp_path / "stdlib.yaml").write_text(micro_config.read_text())
    overrides = ["budget={flops: 75%}", "fidelity={check: 8, steps: 2}", "retrain.seeds=2", "retrain.steps=4"]
    monkeypatch.setattr("sys.argv", ["run", "stdlib", *overrides, "--out", str(tmp_path / "out")])
    run.main()
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    rows = read_rows(tmp_path / "out" / "stdlib.jsonl")
    assert {row["seed"] for row in rows} == {0, 1}
    assert all(row["budget"] == "flops" and 0 < row["test_loss"] < 20 for row in rows)
    run.main()
    assert "0 trainings to go" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == written
    summary.summarise(tmp_path / "out", tmp_path / "figure.png")
    (result,) = read_value(tmp_path / "out" / "result.json", dict)["results"]
    assert {row["kind"] for row in result["models"]} == set(models.COUNTS)


def test_the_committed_result_is_that_of_the_committed_rows():
    result = json.loads(json.dumps(summary.collect(run.HERE)))
    assert result == read_value(run.HERE / "result.json", dict)
    assert (run.HERE / "result.md").read_text(encoding="utf-8") == summary.tables(result)
    tests = [
        row["above"]["searched"] for one in result["results"] for row in one["models"] if "searched" in row["above"]
    ]
    assert sum("verdict" in test for test in tests) == 15


def test_the_readme_has_the_corrected_verdicts_of_the_committed_result():
    result = read_value(run.HERE / "result.json", dict)
    text = (run.HERE.parents[1] / "README.md").read_text(encoding="utf-8")
    bold = set(re.findall(r"\*\*(\+0\.\d{3} \[[^]]*\])\*\*", text))
    paid = {
        summary.difference_text(row, "searched")
        for one in result["results"]
        for row in one["models"]
        if row["above"].get("searched", {}).get("verdict") == "paid"
    }
    assert bold == paid
    assert len(paid) == 1


@pytest.mark.parametrize("folder", [run.HERE, run.HERE / "tight"], ids=lambda folder: folder.name)
def test_committed_rows_are_of_models_that_can_be_read(folder: Path):
    for path in folder.glob("*.models.json"):
        budgets = read_value(path, dict)["budgets"]
        rows = [row for budget in budgets.values() for row in budget["models"]]
        known = {Architecture.from_dict(row["architecture"]).fingerprint for row in rows}
        assert known == {row["fingerprint"] for row in rows}
        assert {row["fingerprint"] for row in read_rows(folder / path.name.replace(".models.json", ".jsonl"))} <= known
