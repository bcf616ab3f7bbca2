"""Times models in turns, so that what slows the machine slows all of them: a decoding step, and a prefill."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from moesaic import Transformer
from moesaic.supernet import KeyValueCache

Step = Callable[[], object]


def _tokens(model: Transformer, batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def decoding(model: Transformer, length: int) -> Step:
    """A step of one sequence after ``length`` tokens."""
    cache = KeyValueCache(model.architecture, 1, length + 1, model.device)
    tokens = _tokens(model, 1, length)
    model.run(tokens, cache=cache)

    def step() -> None:
        cache.length = length
        model.run(tokens[:, :1], cache=cache)

    return step


def prefill(model: Transformer, batch: int, length: int) -> Step:
    """A pass over ``batch`` sequences."""
    tokens = _tokens(model, batch, length)
    return lambda: model.run(tokens)


@torch.inference_mode()
def in_turns(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step in every round; a round before them warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times
