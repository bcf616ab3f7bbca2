"""HAT's latencies: drift told from architecture in made-up measurements, and what is said of wrong files."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.hat_latency import predictors, run
from moesaic import MoesaicError


def table(count: int, drift: np.ndarray, noise: float = 0.01) -> list[dict[str, float]]:
    """Networks of HAT's space with latencies that 9 terms express, on a machine that drifts."""
    rng = np.random.default_rng(0)
    choices = ([512, 640], [6], [512, 1024, 3072], [2, 4, 8], [512, 640], [1, 2, 3, 4, 5, 6], [512, 1024, 3072])
    features = np.stack([rng.choice(c, count) for c in (*choices, [2, 4, 8], [2, 4, 8], [1, 2, 3])], axis=1) * 1.0
    rows = predictors.Rows(features, np.zeros(count), np.zeros(count), np.arange(count))
    speed = np.exp(drift + rng.normal(0, noise, count))
    encoder = rows.encoder_terms @ [2.0, 5e-4, 2e-7] * speed
    decoder = rows.terms[:, 3:] @ [20.0, 5e-3, 3e-6, 1.0, 1e-3, 1e-2] * speed
    columns = np.column_stack([features, encoder, decoder])
    names = (*predictors.FEATURES, *predictors.LATENCIES)
    return [dict(zip(names, row.tolist(), strict=True)) for row in columns]


def write(path: Path, rows: list[dict[str, float]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> Path:
    """A machine that is a quarter slower for the second half and for twenty rows of the first."""
    at = np.arange(300)
    return write(tmp_path_factory.mktemp("hat") / "steps.csv", table(300, 0.25 * ((at >= 150) | (at // 20 == 3))))


def test_drift_is_told_from_architecture(steps):
    rows = predictors.read(steps)
    order = np.random.default_rng(1).permutation(300)
    train, test = rows.take(order[:240]), rows.take(order[240:])
    ours = predictors.Drifting.of(train)

    def error(predicted):
        return np.abs(predicted / test.latency - 1).mean()

    assert error(ours.at_time(test)) < 0.025
    assert error(ours.at_typical_speed(test)) > 0.08
    assert error(predictors.nnls(train, test)) > 0.08


def test_without_drift_the_order_of_rows_changes_nothing(tmp_path):
    rows = predictors.read(write(tmp_path / "quiet.csv", table(200, np.zeros(200))))
    ours = predictors.Drifting.of(rows)
    assert ours.at_time(rows) == pytest.approx(ours.at_typical_speed(rows))
    assert ours.at_time(rows) == pytest.approx(rows.latency, rel=0.05)


def test_anchors_know_a_speed_that_the_training_rows_had_not(steps):
    rows = predictors.read(steps)
    mape = {
        name: of["mape"]
        for name, of in run.forecasts(rows.take(np.arange(150)), rows.take(np.arange(150, 300))).items()
    }
    assert mape["ours, with anchors"] < 0.03
    assert min(mape["NNLS"], mape["ours"], mape["ours, last speed held"]) > 0.15


def test_the_depth_mean_of_a_new_depth_is_the_mean_of_all():
    features = np.full((4, 10), 1.0)
    features[:, 5] = [1, 1, 2, 6]
    rows = predictors.Rows(features, np.zeros(4), np.array([1.0, 3.0, 8.0, 9.0]), np.arange(4))
    assert predictors.depth_mean(rows.take(np.arange(3)), rows).tolist() == [2.0, 2.0, 8.0, 4.0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda rows: [{k: v for k, v in row.items() if "layer" not in k} for row in rows], "decoder_layer_num"),
        (lambda rows: [*rows[:50], {**rows[50], "latency_mean_decoder": "fast"}, *rows[51:]], "wrong.csv:52"),
        (lambda rows: [*rows[:50], {**rows[50], "latency_mean_decoder": "nan"}, *rows[51:]], "wrong.csv:52"),
        (lambda rows: rows[:20], "too few"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, monkeypatch, damage, said):
    monkeypatch.setattr(run, "scikit_learn", lambda: None)
    path = write(tmp_path / "wrong.csv", damage(table(120, np.zeros(120))))
    with pytest.raises(MoesaicError, match=said) as error:
        run.main([str(path)])
    assert str(path) in str(error.value)


def test_a_missing_or_binary_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "scikit_learn", lambda: None)
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    for name in ("none.csv", "binary.csv"):
        with pytest.raises(MoesaicError, match=name):
            run.main([str(tmp_path / name)])


def test_boosting_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(MoesaicError, match="pip install scikit-learn"):
        predictors.scikit_learn()


def test_the_script_prints_one_result_and_draws_it(steps, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(predictors, "HAT_STEPS", 5)
    monkeypatch.setattr(predictors, "TREES", 5)
    run.main([str(steps), "--json", "--seeds", "2", "--out", str(tmp_path)])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "result.json").read_text())
    assert (tmp_path / "predicted_measured.png").stat().st_size > 10_000
    (result,) = printed["files"]
    assert result["file"] == "steps.csv"
    assert result["random_splits"]["ours, order known"]["mape"] < result["random_splits"]["ours"]["mape"] / 2
    assert result["drift_share_of_squared_error"] > 0.8
    assert set(result["mape_by_training_rows"]["NNLS"]) == {"25", "50", "100"}

    run.main([str(steps), "--seeds", "1"])
    text = capsys.readouterr().out
    assert "steps.csv: 300 rows" in text
    assert "ours, with anchors" in text
