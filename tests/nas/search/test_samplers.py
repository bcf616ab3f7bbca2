"""Every sampler against the contract."""

from typing import ClassVar, get_args

from moesaic.nas.config import SearchConfig
from tests.contracts.samplers import SamplerContract


class TestRandom(SamplerContract):
    sampler = "random"


class TestEvolution(SamplerContract):
    sampler = "evolution"


class TestPuzzle(SamplerContract):
    sampler = "puzzle"


class TestNSGA2(SamplerContract):
    sampler = "nsga2"


class TestTPE(SamplerContract):
    sampler = "tpe"
    trials = 14  # it takes 50 ms for a proposal
    stops: ClassVar = [[0], [10]]
    exhausts = False


def test_every_sampler_has_a_suite():
    assert {suite.sampler for suite in SamplerContract.__subclasses__()} == set(
        get_args(SearchConfig.model_fields["sampler"].annotation)
    )
