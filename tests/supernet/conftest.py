"""Spaces and models small enough to run in milliseconds, with weights large enough to affect the outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moesaic.search_spaces import Architecture, SearchSpace, load_space
from moesaic.search_spaces.yaml_source import YamlSource
from moesaic.supernet import Transformer

VOCABULARY = 23

PRESETS = {
    "tiny": "tiny",
    "small": "small",
    "xmoe": "xmoe",
    "medium, cut down": {"preset": "medium", "width": [48, 64], "depth": [1, 2]},
}


@pytest.fixture(scope="session", params=list(PRESETS))
def preset_space(request: pytest.FixtureRequest) -> SearchSpace:
    return load_space(YamlSource("test", PRESETS[request.param]))


@pytest.fixture(scope="session")
def tiny_space() -> SearchSpace:
    return load_space(YamlSource("test", "tiny"))


@pytest.fixture(scope="session", params=["nested", "packed"])
def sharing(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    def make(architecture: Architecture, sharing: str = "nested", scale: float = 3.0, seed: int = 0) -> Transformer:
        """A model with random weights of 0.02 times ``scale``: a fresh one writes too little to the residual stream,
        so that its slices are all alike."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Transformer(architecture, VOCABULARY, sharing)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        torch.nn.init.normal_(parameter, std=0.02 * scale)
                    else:
                        parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., torch.Tensor]:
    def make(batch: int = 2, length: int = 8, seed: int = 0) -> torch.Tensor:
        return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))

    return make
