"""Measuring blocks and whole models on this device, and fitting the latency predictor to them.

Every configuration is measured once per round and the order is shuffled in each, so a machine that drifts slows
all of them alike. A figure is the lower quartile over rounds: what disturbs a measurement only ever adds to it, and
on a shared machine it may disturb most of them.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor

from nas.config import LatencyConfig
from nas.costs.analytic import Context
from nas.costs.latency import (
    TERMS,
    Accuracy,
    LatencyPredictor,
    attention_terms,
    feed_forward_terms,
    fit,
    head_terms,
    model_terms,
)
from nas.costs.use import LayerUse, Occupancy, measured_use
from nas.device import Device
from search_spaces import Architecture, SearchSpace
from supernet import LayerLoad, Transformer
from supernet.model import TransformerLayer

_VERSION = 2
"""Part of a calibration's key: raised when terms or kernels change what they cost."""
NOISY = 0.15
"""Spread of repeats (interquartile range over median) above which more rounds are measured, and no trust is kept."""
_SECONDS = 1.0
"""Time over which the repeats of one model's measurement are spread at least."""
_PATIENCE = 3
"""How many times the rounds of a quiet machine a noisy one is measured at most."""


@dataclass
class _Case:
    """One thing to time, its terms, and its measurements in milliseconds."""

    kind: str
    run: Callable[[], object]
    terms: np.ndarray
    milliseconds: list[float]

    @property
    def figure(self) -> float:
        return steady(self.milliseconds)

    @property
    def spread(self) -> float:
        quarter, median, three_quarters = np.percentile(self.milliseconds, [25, 50, 75])
        return float((three_quarters - quarter) / median)


@dataclass(frozen=True)
class Calibration:
    """A predictor and the measurements behind it: rows of kind, measured and predicted milliseconds, terms."""

    predictor: LatencyPredictor
    rows: list[dict[str, float | str]]


def calibration_key(space: SearchSpace, context: Context, config: LatencyConfig, device: Device) -> str:
    """What a calibration depends on. The same key on the same machine gives the same predictor from the cache."""
    facts = [_VERSION, TERMS, space.envelope.to_dict(), asdict(context), config.model_dump(), asdict(device)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def calibrate(
    space: SearchSpace,
    tokens: Tensor,
    context: Context,
    config: LatencyConfig,
    device: Device,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Measure ``config.blocks`` blocks and ``config.models`` models of ``space`` on ``tokens`` [B, S]; fit and test.

    Half of the whole models are fitted with the blocks; the other half only tells how large the error is. Weights
    are random: a latency belongs to a shape and a load, and both are known for every measurement.
    """
    rng = Random(f"{seed}/latency")
    torch.manual_seed(seed)
    tokens = tokens.to(device.torch_device)
    with torch.inference_mode(), autocast(device):
        blocks = _block_cases(space, tokens, context, config.blocks, device, rng)
        models = [_model_case(space.sample_balanced(rng), tokens, context, device) for _ in range(config.models)]
        cases = [*blocks, *models]
        done, rounds, noise = 0, config.repeats, 0.0
        while done < rounds:
            for case in rng.sample(cases, len(cases)):
                case.milliseconds.append(_time(case.run, device))
            done += 1
            noise = float(np.median([case.spread for case in models]))
            if done == rounds and noise > NOISY:
                rounds = min(rounds + config.repeats, _PATIENCE * config.repeats)
            on_progress(done, rounds)
    fitted, held_out = models[::2], models[1::2]
    training = [*blocks, *fitted]
    weights = np.array([1.0] * len(blocks) + [2.0] * len(fitted))
    coefficients = fit(_matrix(training), np.array([case.figure for case in training]), weights)
    # Between other blocks a block finds colder caches than when it is timed alone: one factor, from whole models.
    ratios = np.array([case.figure for case in fitted]) / (_matrix(fitted) @ np.array(coefficients))
    coefficients = tuple(float(np.median(ratios)) * value for value in coefficients)
    predicted = {id(case): float(case.terms @ np.array(coefficients)) for case in cases}
    accuracy = Accuracy.of(np.array([predicted[id(c)] for c in held_out]), np.array([c.figure for c in held_out]))
    predictor = LatencyPredictor(
        coefficients,
        context,
        str(device),
        device.fingerprint,
        accuracy,
        noise=noise,
        measured_on=datetime.date.today().isoformat(),
        key=calibration_key(space, context, config, device),
    )
    held = {id(case) for case in held_out}
    rows: list[dict[str, float | str]] = [
        {
            "kind": "held-out model" if id(case) in held else case.kind,
            "measured_ms": case.figure,
            "predicted_ms": predicted[id(case)],
            **dict(zip(TERMS, case.terms.tolist(), strict=True)),
        }
        for case in cases
    ]
    return Calibration(predictor, rows)


def measure_model(model: Transformer, tokens: Tensor, device: Device, repeats: int) -> float:
    """Milliseconds of one forward pass of ``model`` over ``tokens`` [B, S], measured as the calibration measures."""
    tokens = tokens.to(device.torch_device)
    found: list[float] = []
    start = time.perf_counter()
    with torch.inference_mode(), autocast(device):
        # A disturbance lasts longer than a pass: repeats that are all over at once may all fall into one.
        while len(found) < repeats or time.perf_counter() - start < _SECONDS:
            found.append(_time(lambda: model(tokens), device))
    return steady(found)


def steady(milliseconds: list[float]) -> float:
    """The lower quartile of repeated measurements."""
    return float(np.percentile(milliseconds, 25))


@contextmanager
def autocast(device: Device) -> Iterator[None]:
    with torch.autocast(device.kind, dtype=torch.bfloat16, enabled=device.bfloat16):
        yield


def _time(run: Callable[[], object], device: Device) -> float:
    """The better of two runs after one that warms caches up, in milliseconds."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.kind == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    once()
    return min(once(), once())


def _block_cases(
    space: SearchSpace, tokens: Tensor, context: Context, count: int, device: Device, rng: Random
) -> list[_Case]:
    """Blocks of random architectures: a third attention, the rest feed-forward parts, and a head per width."""
    cases = []
    for index in range(count - len(space.widths)):
        architecture = space.sample_balanced(rng)
        position = rng.randrange(len(architecture.decoder.layers))
        layer, width = architecture.decoder.layers[position], architecture.decoder.width
        module = TransformerLayer(width, layer, architecture.backbone, "nested").to(device.torch_device).eval()
        _randomise(module)
        x = torch.randn(*tokens.shape, width, device=device.torch_device)
        if index % 3 == 0:
            terms = np.array(attention_terms(width, layer, space.backbone, context))
            cases.append(
                _Case(
                    "attention",
                    lambda m=module, x=x, a=layer.attention: x + m.attention(m.attention_norm(x), a),
                    terms,
                    [],
                )
            )
            continue

        def run(m: TransformerLayer = module, x: Tensor = x, part=layer.feed_forward):
            out, routing = m.feed_forward(m.feed_forward_norm(x).flatten(0, 1), part)
            return x + out.view_as(x), routing

        use = _use(layer.feed_forward, run()[1])
        terms = np.array(feed_forward_terms(width, layer, use, space.backbone, context))
        cases.append(_Case("sparse" if layer.feed_forward.router else "dense", run, terms, []))
    for width in space.widths:
        architecture = space.build(width, space.smallest.decoder.layers)
        model = Transformer(architecture, context.vocab_size).to(device.torch_device).eval()

        def run_head(m: Transformer = model):
            weight = m.embedding.weight
            return torch.nn.functional.linear(m.norm(torch.nn.functional.embedding(tokens, weight)), weight)

        cases.append(_Case("head", run_head, np.array(head_terms(width, context)), []))
    return cases


def _model_case(architecture: Architecture, tokens: Tensor, context: Context, device: Device) -> _Case:
    model = Transformer(architecture, context.vocab_size).to(device.torch_device).eval()
    _randomise(model)
    output = model.run(tokens)
    uses = [
        _use(layer.feed_forward, routing)
        for layer, routing in zip(architecture.decoder.layers, output.routings, strict=True)
    ]
    return _Case("model", lambda: model(tokens), model_terms(architecture, uses, context), [])


def _randomise(module: torch.nn.Module) -> None:
    """Routers that tell tokens apart, so that thresholds keep about as many experts as trained ones do."""
    for name, parameter in module.named_parameters():
        if name.endswith("router"):
            torch.nn.init.normal_(parameter, std=2.0 / parameter.shape[1] ** 0.5)
        elif parameter.dim() == 2 and parameter.shape[0] > 0 and "embedding" not in name:
            torch.nn.init.normal_(parameter, std=0.02)


def _use(part, routing) -> LayerUse:
    if routing is None:
        return Occupancy().expected(part)
    share = routing.load.double() / len(routing.probabilities)
    return measured_use(part, LayerLoad(tuple(share.tolist())))


def _matrix(cases: list[_Case]) -> np.ndarray:
    return np.stack([case.terms for case in cases])
