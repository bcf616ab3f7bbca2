import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moesaic.nas.units import DIMENSIONS, format_cost, parse_limit
from moesaic.search_spaces import MoesaicError


@pytest.mark.parametrize(
    ("text", "cost", "value"),
    [
        ("2.5 GFLOPs", "flops", 2.5e9),
        ("700kFLOPs", "flops", 7e5),
        ("12 ms", "latency", 12.0),
        ("800 us", "latency", 0.8),
        ("800 µs", "latency", 0.8),
        ("1.5 s", "latency", 1500.0),
        ("50M", "parameters", 5e7),
        (1200000, "parameters", 1.2e6),
        ("1.2 GB", "memory", 1.2e9),
        ("1 GiB", "memory", 2.0**30),
        ("3 gflops", "flops", 3e9),
        ("1e3 MFLOPs", "flops", 1e9),
    ],
)
def test_quantities_are_read_in_base_units(text, cost, value):
    assert parse_limit(text, cost).value == pytest.approx(value)


def test_shares_are_of_the_largest():
    assert parse_limit("60%", "flops").resolve(largest=50.0) == pytest.approx(30.0)


@pytest.mark.parametrize(
    ("text", "cost", "words"),
    [
        ("12", "latency", "needs a unit"),
        ("12 GFLOPs", "latency", "not measured in GFLOPs"),
        ("3 ms", "flops", "not measured in ms"),
        ("0 ms", "latency", "leaves nothing"),
        ("-5 MB", "memory", "leaves nothing"),
        ("0%", "flops", "leaves nothing"),
        ("lots", "memory", "not a quantity"),
        ("1.2.3 ms", "latency", "not a quantity"),
        ("nan ms", "latency", "not a quantity"),
        ("1e999 ms", "latency", "not a quantity"),
    ],
)
def test_wrong_quantities_say_what_is_allowed(text, cost, words):
    with pytest.raises(MoesaicError, match=words) as caught:
        parse_limit(text, cost)
    assert caught.value.allowed


def test_a_misspelt_unit_names_the_nearest():
    with pytest.raises(MoesaicError) as caught:
        parse_limit("3 GFLOP", "flops")
    assert caught.value.nearest == "3 GFLOPs"


@given(st.sampled_from(sorted(DIMENSIONS)), st.floats(1e-2, 1e13))
def test_what_is_printed_can_be_read_back(cost, value):
    text = DIMENSIONS[cost].format(value)
    assume(value >= 1 or cost not in ("flops", "memory"))
    assert parse_limit(text, cost).value == pytest.approx(value, rel=1e-3)


def test_printed_costs_say_what_they_are_per():
    assert format_cost("flops", 1.2e6) == "1.2 MFLOPs per token"
    assert format_cost("latency", math.inf).startswith("inf")
