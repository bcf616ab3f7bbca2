import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from moesaic.nas.config import Config, DeviceConfig, LatencyConfig
from moesaic.nas.context import Context
from moesaic.nas.costs.latency.calibrate import calibrate, calibration_key
from moesaic.nas.costs.latency.predictor import TERMS, LatencyPredictor, model_terms
from moesaic.nas.costs.latency.probe import Pass, random_passes, text_pass
from moesaic.nas.costs.latency.selection import flops_of, select
from moesaic.nas.costs.measure import LatencyFigures, time_pass
from moesaic.nas.costs.price import Pricer
from moesaic.nas.device import choose_device
from moesaic.nas.search.budget import resolve_budget
from moesaic.search_spaces import Architecture, MoesaicError, load_space, preset_source
from moesaic.supernet import Batch, Transformer

SPACE = load_space(preset_source("tiny"))
CONTEXT = Context(64, 16, 2)
CONTEXTS = {"prefill": CONTEXT, "decode": replace(CONTEXT, phase="decode")}
CPU = choose_device(DeviceConfig(device="cpu", threads=1))
CONFIG = LatencyConfig(batch_size=2, models=16, repeats=3)


def members(count: int) -> list[Architecture]:
    rng = Random(0)
    return [SPACE.sample_balanced(rng) for _ in range(count)]


@pytest.fixture(scope="module", params=list(CONTEXTS))
def calibration(request):
    return calibrate(SPACE, CONTEXTS[request.param], CONFIG, CPU, seed=0)


@pytest.fixture(scope="module")
def predictor() -> LatencyPredictor:
    return calibrate(SPACE, CONTEXT, CONFIG, CPU, seed=0).predictor


# ---------------------------------------------------------------- terms


@pytest.mark.parametrize("phase", list(CONTEXTS))
def test_terms_add_up_over_layers(phase):
    context = CONTEXTS[phase]
    pricer = Pricer(context)
    two = next(a for a in members(50) if len(a.layers) == 2)
    ones = [replace(two, decoder=replace(two.output, layers=(layer,))) for layer in two.output.layers]
    whole = model_terms(two, pricer.expected_uses(two), context)
    parts = np.sum([model_terms(a, pricer.expected_uses(a), context) for a in ones], axis=0)
    assert whole[2:] == pytest.approx(parts[2:])
    assert whole[:2] == pytest.approx(parts[:2] / 2)  # those of the model itself


def test_the_products_of_a_dense_model_are_half_its_flops():
    dense = next(a for a in members(300) if all(layer.feed_forward.router is None for layer in a.layers.values()))
    pricer = Pricer(CONTEXT)
    terms = dict(zip(TERMS, model_terms(dense, pricer.expected_uses(dense), CONTEXT), strict=True))
    products = terms["vocabulary_products"] + terms["projection_products"] + terms["dense_products"]
    products += 2 * terms["score_products"]  # with the keys and with the values
    assert 2 * products == pytest.approx(CONTEXT.tokens * pricer.expected(dense)["flops"])


def test_a_prediction_is_its_terms_times_the_coefficients(predictor):
    coefficients = np.random.default_rng(0).uniform(0, 1, len(TERMS))
    other, pricer = replace(predictor, coefficients=tuple(coefficients)), Pricer(CONTEXT)
    for architecture in members(20):
        uses = pricer.expected_uses(architecture)
        expected = model_terms(architecture, uses, CONTEXT) @ coefficients
        assert other.predict(architecture, uses) == pytest.approx(expected)


# ---------------------------------------------------------------- passes


def test_a_decoding_pass_computes_the_last_position_of_a_prefill():
    (decode,) = random_passes([SPACE.largest], CONTEXTS["decode"], CPU, seed=3)
    shape = (CONTEXT.batch_size, CONTEXT.sequence_length + 1)
    tokens = torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(0))
    step, whole = Pass(decode.model, tokens, CONTEXTS["decode"], CPU), decode.model(tokens)
    for _ in range(2):  # a pass leaves nothing behind
        assert step.plain().logits[:, 0].sub(whole[:, -1]).abs().max() < 1e-5


def some_windows() -> torch.Tensor:
    return torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(0))


def test_text_is_repeated_to_the_shape_of_a_context():
    batch = Batch(some_windows(), some_windows())
    tokens = text_pass(Transformer(SPACE.smallest, 64), batch, Context(64, 20, 5), CPU).tokens
    assert tokens.shape == (5, 20)
    whole = some_windows().flatten().tolist() * 4
    assert tokens.tolist() == [whole[21 * row : 21 * row + 20] for row in range(5)]


def test_random_models_share_one_buffer_and_are_rebuilt_from_their_seed():
    architectures = members(6)
    passes, again = (random_passes(architectures, CONTEXT, CPU, seed=1) for _ in range(2))
    storages = {next(one.model.parameters()).untyped_storage().data_ptr() for one in passes}
    assert len(storages) == 1
    for one, other in zip(passes, again, strict=True):
        assert one.plain().logits.equal(other.plain().logits)
    (alone,) = random_passes(architectures[:1], CONTEXT, CPU, seed=2)
    assert not alone.plain().logits.equal(passes[0].plain().logits)


# ---------------------------------------------------------------- calibration


def test_calibration_keeps_models_apart_that_only_judge(calibration):
    rows, predictor = calibration.rows, calibration.predictor
    kinds = [row["kind"] for row in rows]
    assert kinds.count("model") == len(predictor.log_residuals) == 12
    assert kinds.count("held-out model") == predictor.accuracy.count == 4
    assert all(row["measured_ms"] > 0 and row["measurements"] >= 3 for row in rows)
    assert predictor.measured.measurements > 16 * 3 * 5 / 4
    relative = [abs(row["predicted_ms"] / row["measured_ms"] - 1) for row in rows if row["kind"] == "held-out model"]
    assert predictor.accuracy.mape == pytest.approx(np.mean(relative))
    assert min(predictor.coefficients) >= 0


def test_a_prediction_is_of_the_order_of_a_measurement(calibration):
    predictor = calibration.predictor
    context = predictor.context
    (one,) = random_passes([SPACE.largest], context, CPU, seed=0)
    predicted = predictor.predict(SPACE.largest, one.uses())
    timing = time_pass(one, predictor, CPU)
    assert timing.corrected_ms / 4 < predicted < timing.corrected_ms * 4
    figures = LatencyFigures.of(timing, predicted, predictor)
    assert figures.low_ms < figures.high_ms
    assert f"{figures.anchor_ratio:.2f} times" in str(figures)


def test_a_calibration_belongs_to_device_context_and_space():
    other_layers = replace(SPACE, decoder=replace(SPACE.decoder, widths=SPACE.decoder.widths[-1:]))
    assert other_layers.envelope == SPACE.envelope
    other_backbone = replace(SPACE, backbone=replace(SPACE.backbone, rotary_base=500.0))
    keys = {
        calibration_key(other_layers, CONTEXT, CONFIG, CPU),
        calibration_key(other_backbone, CONTEXT, CONFIG, CPU),
        calibration_key(SPACE, CONTEXT, CONFIG.model_copy(update={"time_limit": 9.0}), CPU),
        calibration_key(SPACE, CONTEXT, CONFIG, replace(CPU, dtype="bfloat16")),
        calibration_key(SPACE, CONTEXT, CONFIG, CPU),
        calibration_key(SPACE, replace(CONTEXT, batch_size=4), CONFIG, CPU),
        calibration_key(SPACE, CONTEXTS["decode"], CONFIG, CPU),
        calibration_key(SPACE, CONTEXT, CONFIG, replace(CPU, threads=7)),
        calibration_key(load_space(preset_source("small")), CONTEXT, CONFIG, CPU),
    }
    assert len(keys) == 9
    assert calibration_key(replace(SPACE, name="other"), CONTEXT, CONFIG, CPU) in keys


def test_decoding_models_share_the_memory_of_one_cache():
    passes = random_passes(members(6), CONTEXTS["decode"], CPU, seed=1)
    caches = [one.cache for one in passes]
    assert len({cache.tensors[0].untyped_storage().data_ptr() for cache in caches}) == 1
    assert caches[0].tensors[0].untyped_storage().nbytes() == max(cache.bytes for cache in caches)
    for one in passes:
        first = one.plain().logits
        assert first.isfinite().all()
        assert one.plain().logits.equal(first)  # other models write to the same memory only at the last position


@pytest.mark.parametrize("phase", list(CONTEXTS))
def test_a_time_limit_is_kept_by_shallow_models_and_whole_ones_judge(phase):
    config = CONFIG.model_copy(update={"time_limit": 0.01})
    found = calibrate(SPACE, CONTEXTS[phase], config, CPU, seed=0)
    whole = [row for row in found.rows if row["kind"] == "held-out model"]
    assert len(whole) == found.predictor.accuracy.count == len(found.predictor.log_residuals) == 3
    assert {row["vocabulary"] for row in whole} == {CONTEXT.vocab_size}
    assert {row["measurements"] for row in whole} == {1}
    assert found.predictor.measured.shallow == len(found.rows) - 3 >= len(TERMS)
    assert any(row["vocabulary"] < CONTEXT.vocab_size for row in found.rows)
    assert "models of 1 or 2 layers" in found.predictor.describe()
    assert np.mean(found.predictor.log_residuals) == pytest.approx(0)  # whole models give the scale
    time_pass(random_passes([SPACE.largest], found.predictor.context, CPU, 0)[0], found.predictor, CPU)


# ---------------------------------------------------------------- which models are measured


MEDIUM = load_space(preset_source("medium"))


def selection(limit: float, seconds_per_flop: float):
    rng, context = Random(0), Context(32_000, 512, 8)
    members = [MEDIUM.sample_balanced(rng) for _ in range(80)]
    found = select(members, context, LatencyConfig(time_limit=limit), seconds_per_flop, rng)
    return members, context, found


def test_whole_models_are_measured_where_time_allows():
    members, context, found = selection(180, 1e-16)
    assert (found.architectures, found.shallow) == (members, False)
    assert found.held_out.sum() == 20
    assert set(found.vocab_sizes) == {context.vocab_size}


@pytest.mark.parametrize("limit", [180, 600])
def test_shallow_models_fill_the_time_limit(limit):
    speed = 1e-11  # 100 GFLOP/s
    members, context, found = selection(limit, speed)
    assert found.shallow
    whole = int(found.held_out.sum())
    assert found.architectures[-whole:] == members[:whole]
    assert {len(a.layers) for a in found.architectures[:-whole]} == {1, 2}
    seconds = [
        speed * flops_of(a, replace(context, vocab_size=v))
        for a, v in zip(found.architectures, found.vocab_sizes, strict=True)
    ]
    passes = 2 * sum(seconds[-whole:]) + (1 + found.rounds * 1.25) * sum(seconds[:-whole])  # one long pass each
    assert 0.5 * limit < passes <= 1.1 * limit
    few = found.near_anchors(context)
    assert len(few) == 5
    assert not found.held_out[few].any()


def test_shallow_models_tell_as_many_coefficients_apart_as_whole_ones():
    members, context, found = selection(180, 1e-11)

    def rank(architectures, vocab_sizes):
        contexts = [replace(context, vocab_size=size) for size in vocab_sizes]
        pairs = zip(architectures, contexts, strict=True)
        terms = np.stack([model_terms(a, Pricer(own).expected_uses(a), own) for a, own in pairs])
        return np.linalg.matrix_rank(terms / terms.max(axis=0))

    fitted = int((~found.held_out).sum())
    measured = rank(found.architectures[:fitted], found.vocab_sizes[:fitted])
    assert measured >= rank(members, [context.vocab_size] * len(members)) >= len(TERMS) - 2  # every expert is live


# ---------------------------------------------------------------- the file


def test_a_predictor_survives_its_file_and_is_refused_elsewhere(calibration, tmp_path):
    path = tmp_path / "predictor.json"
    calibration.predictor.save(path)
    assert LatencyPredictor.load(path, CPU) == calibration.predictor
    assert set(json.loads(path.read_text())["coefficients"]) == set(TERMS)
    other = replace(CPU, name="Another processor")
    with pytest.raises(MoesaicError, match="another device") as caught:
        LatencyPredictor.load(path, other)
    assert CPU.name in str(caught.value.found)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"coefficients": {"x": 1}}', "null", "3"])
def test_a_damaged_predictor_is_one_message(tmp_path, text):
    path = tmp_path / "predictor.json"
    path.write_text(text)
    with pytest.raises(MoesaicError):
        LatencyPredictor.load(path, CPU)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("coefficients", {}),
        ("log_residuals", []),
        ("log_residuals", ["x"]),
        ("context", {"phase": 1}),
        ("anchors", None),
    ],
)
def test_a_predictor_with_a_damaged_part_is_one_message(predictor, tmp_path, key, value):
    path = tmp_path / "predictor.json"
    predictor.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(MoesaicError, match="not a latency predictor"):
        LatencyPredictor.load(path, CPU)


# ---------------------------------------------------------------- confidence


def test_a_confidence_binds_the_upper_edge_of_the_prediction(predictor):
    residuals = tuple(np.random.default_rng(0).normal(0, 0.05, 60))
    predictor = replace(predictor, log_residuals=residuals, coefficients=(1.0,) * len(TERMS))
    pricer = Pricer(CONTEXT, predictor=predictor)

    def budget(**line):
        config = Config.model_validate({"budget": {"latency": {"limit": "60%", **line}}, "space": "tiny"})
        return resolve_budget(config.budget, SPACE, pricer)

    plain, sure = budget(), budget(confidence=0.95)
    margin = predictor.margin(0.95)
    assert 1.05 < margin < 1.15
    assert margin == pytest.approx(predictor.interval(0.9).high)  # 5 % above, 5 % below
    found = members(200)
    for architecture in found:
        assert sure.excess(architecture)["latency"] + 1 == pytest.approx(
            (plain.excess(architecture)["latency"] + 1) * margin
        )
        measured = pricer.expected(architecture)
        assert sure.measured_excess(measured) == pytest.approx(sure.excess(architecture))
    assert sum(map(sure.fits, found)) < sum(map(plain.fits, found))
    assert "confidence 0.95" in str(sure.lines[0])


def test_more_confidence_binds_more(predictor):
    margins = [predictor.margin(confidence) for confidence in (0.55, 0.8, 0.95, 0.99)]
    assert margins == sorted(margins)
