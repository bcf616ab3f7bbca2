"""Counters of FLOPs agree with the closed form on whole models, and a missing one is one message."""

import sys
from random import Random

import pytest
import torch

from moesaic.kernels import IMPLEMENTATIONS
from moesaic.nas.context import Context
from moesaic.nas.costs.count import count_flops
from moesaic.search_spaces import MoesaicError, load_space, preset_source
from moesaic.supernet import Transformer, experts

SPACE = load_space(preset_source("small"))


def model(seed: int) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(SPACE.sample_balanced(Random(seed)), 61)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_counter_finds_the_closed_form(phase):
    for seed in range(3):
        counted = count_flops(model(seed), Context(61, 9, 2, phase=phase))
        assert [row.counter for row in counted] == ["closed form", "torch FlopCounterMode", "fvcore"]
        assert counted[1].flops == pytest.approx(counted[0].flops, rel=1e-9)
        assert counted[2].flops == pytest.approx(counted[0].flops, rel=1e-9)
        assert all(row.leaves_out for row in counted)


def test_counting_leaves_the_implementation_as_it_was():
    before = IMPLEMENTATIONS["torch"], experts.route
    count_flops(model(0), Context(61, 9, 2))
    assert (IMPLEMENTATIONS["torch"], experts.route) == before


def test_without_fvcore_there_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore", None)
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    with pytest.raises(MoesaicError, match="fvcore is not installed") as caught:
        count_flops(model(0), Context(61, 9, 2))
    assert "moesaic[count]" in str(caught.value)
