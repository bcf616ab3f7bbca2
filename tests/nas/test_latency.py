from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from nas.config import DeviceConfig, LatencyConfig
from nas.costs.analytic import Context
from nas.costs.calibrate import calibrate, calibration_key, measure_model, steady
from nas.costs.latency import TERMS, Accuracy, LatencyPredictor, fit, model_terms
from nas.costs.price import Pricer
from nas.device import choose_device
from search_spaces import MoesaicError, load_space, preset_source
from supernet import Transformer

SPACE = load_space(preset_source("tiny"))
CONTEXT = Context(64, 16, 2)


def terms_of(count: int) -> np.ndarray:
    rng, pricer = Random(0), Pricer(CONTEXT)
    found = [SPACE.sample_balanced(rng) for _ in range(count)]
    return np.stack([model_terms(a, pricer.expected_uses(a), CONTEXT) for a in found])


def test_the_fit_finds_times_that_its_model_can_express():
    terms = terms_of(200)
    truth = np.random.default_rng(0).uniform(0, 1e-4, len(TERMS)) * (np.arange(len(TERMS)) % 3 > 0)
    milliseconds = terms @ truth
    coefficients = np.array(fit(terms, milliseconds, np.ones(len(terms))))
    assert (coefficients >= 0).all()
    assert terms @ coefficients == pytest.approx(milliseconds, rel=1e-3)


def test_the_fit_weighs_relative_errors():
    terms = terms_of(100)
    noisy = (terms @ np.full(len(TERMS), 1e-5)) * np.random.default_rng(1).lognormal(0, 0.05, len(terms))
    predicted = terms @ np.array(fit(terms, noisy, np.ones(len(terms))))
    accuracy = Accuracy.of(predicted, noisy)
    assert accuracy.mape < 0.06
    assert abs(accuracy.bias) < 0.02


def test_terms_add_up_over_layers():
    pricer = Pricer(CONTEXT)
    two = next(a for a in map(SPACE.sample_balanced, [Random(i) for i in range(50)]) if len(a.decoder.layers) == 2)
    ones = [SPACE.build(two.decoder.width, (layer,)) for layer in two.decoder.layers]
    whole = model_terms(two, pricer.expected_uses(two), CONTEXT)
    parts = sum(model_terms(a, pricer.expected_uses(a), CONTEXT) for a in ones)
    head = [i for i, name in enumerate(TERMS) if name.startswith("head")]
    rest = [i for i in range(len(TERMS)) if i not in head]
    assert whole[rest] == pytest.approx(parts[rest])
    assert whole[head] == pytest.approx(parts[head] / 2)


@pytest.fixture(scope="module")
def calibration():
    device = choose_device(DeviceConfig(device="cpu", threads=1))
    tokens = torch.randint(0, 64, (2, 16))
    config = LatencyConfig(batch_size=2, blocks=16, models=8, repeats=3)
    return calibrate(SPACE, tokens, CONTEXT, config, device, seed=0), device


def test_calibration_measures_every_kind_of_block_and_keeps_models_apart(calibration):
    result, _ = calibration
    kinds = [row["kind"] for row in result.rows]
    assert {"attention", "dense", "sparse", "head", "model", "held-out model"} == set(kinds)
    assert kinds.count("held-out model") == kinds.count("model") == result.predictor.accuracy.models == 4
    assert all(row["measured_ms"] > 0 for row in result.rows)


def test_a_prediction_is_of_the_order_of_a_measurement(calibration):
    result, device = calibration
    model = Transformer(SPACE.largest, 64).eval()
    measured = measure_model(model, torch.randint(0, 64, (2, 16)), device, repeats=5)
    predicted = result.predictor.predict(SPACE.largest, Pricer(CONTEXT).expected_uses(SPACE.largest))
    assert measured / 4 < predicted < measured * 4


def test_a_predictor_survives_its_file_and_is_refused_elsewhere(calibration, tmp_path):
    result, device = calibration
    path = tmp_path / "predictor.json"
    result.predictor.save(path)
    assert LatencyPredictor.load(path, device.fingerprint, str(device)) == result.predictor
    other = replace(device, name="Another processor")
    with pytest.raises(MoesaicError, match="another device") as caught:
        LatencyPredictor.load(path, other.fingerprint, str(other))
    assert device.name in str(caught.value.found)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"coefficients": {"x": 1}}'])
def test_a_damaged_predictor_is_one_message(tmp_path, text):
    path = tmp_path / "predictor.json"
    path.write_text(text)
    with pytest.raises(MoesaicError):
        LatencyPredictor.load(path, "x", "x")


def test_a_calibration_belongs_to_device_context_and_space(calibration):
    _, device = calibration
    config = LatencyConfig()
    keys = {
        calibration_key(SPACE, CONTEXT, config, device),
        calibration_key(SPACE, replace(CONTEXT, batch_size=4), config, device),
        calibration_key(SPACE, CONTEXT, config, replace(device, threads=7)),
        calibration_key(load_space(preset_source("small")), CONTEXT, config, device),
    }
    assert len(keys) == 4


def test_disturbed_repeats_do_not_move_the_figure():
    assert steady([10.0, 10.1, 10.2, 30.0, 50.0, 10.05]) == pytest.approx(10.06, abs=0.1)
