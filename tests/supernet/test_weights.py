from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.search_spaces import SearchSpace
from moesaic.supernet.weights import scratch, torch_seed


@given(st.integers(0, 2**200))
def test_torch_takes_a_seed_of_any_size(seed: int) -> None:
    assert torch.Generator().manual_seed(torch_seed(seed)).initial_seed() == torch_seed(seed)
    assert torch_seed(seed) == seed or seed >= 2**63


@pytest.mark.parametrize("seed", [0, 2**32, 2**64, 10**30])
def test_weights_follow_from_the_seed_alone(tiny_space: SearchSpace, seed: int) -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in scratch(11, seed)(tiny_space.smallest).parameters()])

    assert torch.equal(weights(seed), weights(seed))
    assert not torch.equal(weights(seed), weights(seed + 1))
