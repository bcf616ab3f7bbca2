"""Spaces small enough to enumerate, each with one special feature and counts worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from moesaic.search_spaces import SearchSpace, load_space
from moesaic.search_spaces.yaml_source import YamlSource


@dataclass(frozen=True)
class SmallSpace:
    """``members`` distinct architectures, ``raw`` with the order of experts told apart."""

    text: str
    members: int
    raw: int

    @property
    def data(self) -> dict[str, Any]:
        return yaml.safe_load(self.text)

    @property
    def space(self) -> SearchSpace:
        return load_space(YamlSource("small", self.data))


SMALL_SPACES = {
    # 2 pairs of heads; parts: 1 expert 2, 2 experts 3 x 2 x 3 routers, 3 experts 4 x 2 x 4 routers
    "sparse": SmallSpace(
        """
width: [32]
depth: [1]
layer:
  heads: [2]
  kv_heads: [1, 2]
  experts: [1, 2, 3]
  expert_sizes: [16, 32]
  dense_sizes: [32, 48]
  shared_sizes: [0, 16]
  routers: [{kind: top_k, k: [1, 2]}, {kind: threshold, threshold: [0.7], max_k: [1, 2, 4]}]
""",
        members=2 * (2 + 3 * 2 * 3 + 4 * 2 * 4),
        raw=2 * (2 + 4 * 2 * 3 + 8 * 2 * 4),
    ),
    # 3 pairs of heads x 2 sizes in each of one or two layers
    "dense": SmallSpace(
        """
width: [16, 32]
depth: [1, 2]
layer: {heads: [1, 2], kv_heads: [1, 2], experts: [1], dense_sizes: [16, 64]}
""",
        members=2 * (6 + 6 * 6),
        raw=2 * (6 + 6 * 6),
    ),
    # layer 0: 1 + 3 parts, layer 1: dense alone, layer 2: 1 + 1 x 2 parts
    "overrides": SmallSpace(
        """
width: [16, 48]
depth: [1, 3]
layer:
  heads: [1]
  kv_heads: [1]
  experts: [1, 2]
  expert_sizes: [16, 32]
  dense_sizes: [32]
  routers: [{kind: top_k, k: [1]}]
layers:
  1: {experts: [1]}
  2: {expert_sizes: [48], shared_sizes: [0, 16]}
""",
        members=2 * (4 + 4 * 1 * 3),
        raw=2 * (5 + 5 * 1 * 3),
    ),
    # routers: top-1 (max_k 1, twice), and max_k 2 to the most a threshold can keep: 2 and 2 of 2 experts, 2 and 3 of 3,
    # 3 and 3 of 4 for the thresholds 0.55 and 0.7
    "thresholds": SmallSpace(
        """
width: [32]
depth: [1]
layer:
  heads: [2]
  kv_heads: [2]
  experts: [2, 3, 4]
  expert_sizes: [16, 32]
  routers: [{kind: threshold, threshold: [0.55, 0.7], max_k: [1, 2, 3, 8]}]
""",
        members=3 * 3 + 4 * 4 + 5 * 5,
        raw=4 * 3 + 8 * 4 + 16 * 5,
    ),
    # dense 2, and 3 sizes x 2 routers of 2 or 4 experts, whose order has no meaning since they are equal
    "equal": SmallSpace(
        """
width: [32]
depth: [1, 2]
layer:
  heads: [2]
  kv_heads: [2]
  experts: [1, 2, 4]
  expert_sizes: [16, 32, 48]
  dense_sizes: [32, 48]
  equal_sizes: true
  routers: [{kind: top_k, k: [1, 2]}]
""",
        members=14 + 14 * 14,
        raw=14 + 14 * 14,
    ),
}


@pytest.fixture(scope="session", params=list(SMALL_SPACES))
def small(request: pytest.FixtureRequest) -> SmallSpace:
    return SMALL_SPACES[request.param]


@pytest.fixture(scope="session")
def small_space(small: SmallSpace) -> SearchSpace:
    return small.space


@pytest.fixture(scope="session")
def sparse_space() -> SearchSpace:
    return SMALL_SPACES["sparse"].space


@pytest.fixture(scope="session", params=["tiny", "small", "medium", "xmoe"])
def preset_space(request: pytest.FixtureRequest) -> SearchSpace:
    return load_space(YamlSource("test", request.param))
