"""What the tests of executors share: a judge, and a Ray of their own."""

import pytest
import ray
import torch

from moesaic.nas.tasks.language import next_tokens
from moesaic.supernet import Judge, Transformer
from tests.nas.search_tools import tiny_space


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    model = Transformer(tiny_space().envelope, 64).eval()
    return Judge(model, next_tokens(torch.randint(0, 64, (8, 17))))


@pytest.fixture
def own_ray():
    """Each test its own Ray, ended whatever happens."""
    yield
    ray.shutdown()
