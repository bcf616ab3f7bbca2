"""HAT's measurements and predictors of them: its own network, boosting, non-negative terms, terms with drift."""

from __future__ import annotations

import csv
import importlib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from moesaic import Drift, MoesaicError, fit

FEATURES = {  # column: what HAT's predictor divides it by
    "encoder_embed_dim": 640,
    "encoder_layer_num": 6,
    "encoder_ffn_embed_dim_avg": 2048,
    "encoder_self_attention_heads_avg": 6,
    "decoder_embed_dim": 640,
    "decoder_layer_num": 6,
    "decoder_ffn_embed_dim_avg": 2048,
    "decoder_self_attention_heads_avg": 6,
    "decoder_ende_attention_heads_avg": 6,
    "decoder_arbitrary_ende_attn_avg": 2,
}
LATENCIES = ("latency_mean_encoder", "latency_mean_decoder")
HAT_UNITS = (200, 300, 5000)  # milliseconds that HAT divides latencies by: TITAN Xp, Xeon, Raspberry Pi
HAT_STEPS = 5000
TREES = 400
ANCHOR_EVERY = 10
ROUNDS = 3  # of coefficients, drift and weights in turn; a fourth changed MAPE by less than 0.05 points


@dataclass(frozen=True)
class Rows:
    """Measured networks: features [n, 10], milliseconds [n] of encoder and decoder, and places in measuring order."""

    features: np.ndarray
    encoder: np.ndarray
    decoder: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.times)

    def take(self, index: np.ndarray) -> Rows:
        return Rows(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def latency(self) -> np.ndarray:
        return self.encoder + self.decoder

    @property
    def depths(self) -> np.ndarray:
        return self.features[:, 5]

    @property
    def encoder_terms(self) -> np.ndarray:
        width, layers, inner = self.features[:, :3].T
        return np.stack([np.ones(len(self)), layers * width, layers * width * inner], axis=1)

    @property
    def terms(self) -> np.ndarray:
        """[n, 9]. Heads have no term: they share 512 dimensions, so their number does not change the work."""
        source = self.features[:, 0]
        width, layers, inner, _, _, attended = self.features[:, 4:].T
        decoder = [layers, layers * width, layers * width * inner, layers * attended, layers * attended * source, width]
        return np.concatenate([self.encoder_terms, np.stack(decoder, axis=1)], axis=1)

    @property
    def terms_with_heads(self) -> np.ndarray:
        """[n, 12]"""
        layers, heads = self.features[:, [1, 5, 5]], self.features[:, [3, 7, 8]]
        return np.concatenate([self.terms, layers * heads], axis=1)


def read(path: Path) -> Rows:
    """Raises MoesaicError where the file is not a latency table of HAT."""
    try:
        with path.open(newline="") as file:
            table = csv.DictReader(file)
            missing = [name for name in (*FEATURES, *LATENCIES) if name not in (table.fieldnames or ())]
            if missing:
                raise MoesaicError(f"lacks columns of HAT's latency data: {', '.join(missing)}", where=str(path))
            values = np.array([_numbers(row, f"{path}:{table.line_num}") for row in table])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MoesaicError(f"cannot be read as a table: {error}", where=str(path)) from None
    if len(values) < 100:
        raise MoesaicError("has too few measurements to be split", where=str(path), found=len(values), allowed=">= 100")
    return Rows(values[:, :-2], values[:, -2], values[:, -1], np.arange(len(values)))


def _numbers(row: dict[str, str], where: str) -> list[float]:
    try:
        numbers = [float(row[name]) for name in (*FEATURES, *LATENCIES)]
    except (TypeError, ValueError):
        numbers = [math.nan]
    if not all(0 < number < math.inf for number in numbers):
        raise MoesaicError("is not a row of positive numbers", where=where)
    return numbers


@dataclass(frozen=True)
class Drifting:
    """Non-negative terms times the drift of the machine: the predictor under test."""

    coefficients: np.ndarray
    drift: Drift
    typical: float

    @staticmethod
    def of(rows: Rows) -> Drifting:
        """Fits in turn coefficients to drift-corrected measurements and drift to the residuals.

        Huber weights at one standard deviation: disturbances only slow a measurement, so tails are heavy.
        """
        coefficients = fit(rows.terms, rows.latency)
        drift = Drift.of(rows.times, np.log(rows.latency / (rows.terms @ coefficients)))
        for _ in range(ROUNDS - 1):
            factor = drift.factor(rows.times)
            weights = _huber(np.log(rows.latency / (rows.terms @ coefficients * factor)))
            coefficients = fit(rows.terms, rows.latency / factor, weights)
            drift = Drift.of(rows.times, np.log(rows.latency / (rows.terms @ coefficients)))
        return Drifting(coefficients, drift, float(np.median(drift.factor(rows.times))))

    def at_typical_speed(self, rows: Rows) -> np.ndarray:
        """Milliseconds [n] at the median speed of the training rows, without use of the measuring order."""
        return rows.terms @ self.coefficients * self.typical

    def at_time(self, rows: Rows) -> np.ndarray:
        """Milliseconds [n] at the machine's speed for the training rows around each row."""
        return rows.terms @ self.coefficients * self.drift.factor(rows.times)


def _huber(residuals: np.ndarray) -> np.ndarray:
    size = np.abs(residuals)
    return 1 / np.maximum(1.0, size / max(1.4826 * float(np.median(size)), 1e-12))


def anchored(train: Rows, test: Rows) -> np.ndarray:
    """Milliseconds [n] with the speed from anchors: the encoder of every tenth row, also of ``test`` rows.

    HAT measured each encoder (always 6 layers, 4 to 5 % of a latency) just before its decoder. So it can play the part
    of the one model that a calibration measures repeatedly.
    """
    encoder = fit(train.encoder_terms, train.encoder)
    every = [rows.take(rows.times % ANCHOR_EVERY == 0) for rows in (train, test)]
    times = np.concatenate([rows.times for rows in every])
    ratios = np.concatenate([np.log(rows.encoder / (rows.encoder_terms @ encoder)) for rows in every])
    drift = Drift.of(times, ratios)
    at_equal_speed = train.latency / drift.factor(train.times)
    plain = fit(train.terms, at_equal_speed)
    coefficients = fit(train.terms, at_equal_speed, _huber(np.log(at_equal_speed / (train.terms @ plain))))
    return test.terms @ coefficients * drift.factor(test.times)


def nnls(train: Rows, rows: Rows) -> np.ndarray:
    """Non-negative least squares on the relative error with the 12 terms only."""
    return rows.terms_with_heads @ fit(train.terms_with_heads, train.latency)


def depth_mean(train: Rows, rows: Rows) -> np.ndarray:
    """The mean latency of the training rows with the same number of decoder layers (of all rows if none has)."""
    means = {depth: train.latency[train.depths == depth].mean() for depth in np.unique(train.depths)}
    return np.array([means.get(depth, train.latency.mean()) for depth in rows.depths])


def boosting(train: Rows, validation: Rows, rows: Rows, seed: int, order_known: bool = False) -> np.ndarray:
    """Gradient boosting on the log latency; depth and number of trees by the error on ``validation``."""
    ensemble = scikit_learn()

    def columns(of: Rows) -> np.ndarray:
        return np.column_stack([of.features, of.times]) if order_known else of.features

    candidates: list[tuple[float, np.ndarray]] = []
    for depth in (2, 3, 4):
        model = ensemble.GradientBoostingRegressor(
            max_depth=depth, learning_rate=0.05, n_estimators=TREES, subsample=0.5, random_state=seed
        ).fit(columns(train), np.log(train.latency))
        for tuned, found in zip(
            model.staged_predict(columns(validation)), model.staged_predict(columns(rows)), strict=True
        ):
            candidates.append((float(np.abs(np.exp(tuned) / validation.latency - 1).mean()), np.exp(found)))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def scikit_learn() -> Any:
    """``sklearn.ensemble``. Raises MoesaicError if it is not installed: only this experiment needs it."""
    try:
        return importlib.import_module("sklearn.ensemble")
    except ImportError:
        raise MoesaicError(
            "boosting, which this experiment compares with, needs scikit-learn", allowed="pip install scikit-learn"
        ) from None


def hat_mlp(train: Rows, rows: Rows, seed: int) -> np.ndarray:
    """HAT's predictor (latency_predictor.py): scaled features, three hidden layers of 400, Adam at 1e-5, MSE."""
    import torch
    from torch.nn import Linear, ReLU, Sequential

    torch.manual_seed(seed)
    unit = min(HAT_UNITS, key=lambda unit: abs(math.log(unit / train.latency.mean())))
    scale = np.array(list(FEATURES.values()))
    hidden = [layer for _ in range(3) for layer in (Linear(400, 400), ReLU())]
    model = Sequential(Linear(len(scale), 400), ReLU(), *hidden, Linear(400, 1))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-5)
    x = torch.tensor(train.features / scale, dtype=torch.float32)
    y = torch.tensor(train.latency / unit, dtype=torch.float32)
    for _ in range(HAT_STEPS):
        batch = torch.randperm(len(x))[:128]
        loss = torch.nn.functional.mse_loss(model(x[batch])[:, 0], y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return model(torch.tensor(rows.features / scale, dtype=torch.float32))[:, 0].double().numpy() * unit
