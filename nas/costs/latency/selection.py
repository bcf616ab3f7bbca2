"""Which models a calibration measures: whole members of the space, or shallow ones where those would take too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from moesaic.nas.config import LatencyConfig
from moesaic.nas.context import Context
from moesaic.nas.costs.latency.fitting import informative
from moesaic.nas.costs.latency.predictor import TERMS, model_terms
from moesaic.nas.costs.latency.timing import ANCHOR_EVERY, passes_of
from moesaic.nas.costs.price import Pricer
from moesaic.search_spaces import Architecture, Stack

FEWEST_ROUNDS = 3
_HELD_OUT = 4
"""One whole model in this many is held out of the fit."""
_ANCHORS = 5
"""Several anchors represent the models better than one: a slower machine does not slow all models alike."""
_CANDIDATES = 400
"""Shallow models to choose from."""
_SHARE, _FEWEST_WHOLE = 0.4, 3
"""Share of the time limit for whole models, and how many are measured in any case: an interval needs them."""
_FEWEST_SHALLOW = len(TERMS) + 5
_SMALL_VOCABULARY = 16
"""A beam search needs more words than hypotheses."""


@dataclass(frozen=True)
class Selection:
    """Models with their vocabularies. Those ``held_out`` [n] are whole and judge the predictor; the others are whole
    too, or ``shallow``. Each is timed at least ``rounds`` times, but whole ones beside shallow ones once."""

    architectures: list[Architecture]
    vocab_sizes: list[int]
    held_out: np.ndarray
    rounds: int
    shallow: bool

    def near_anchors(self, context: Context) -> list[int]:
        """Indices of a few of the models timed often, evenly spread by FLOPs, without the extremes."""
        often = np.flatnonzero(~self.held_out) if self.shallow else np.arange(len(self.held_out))

        def work(index: int) -> tuple[float, str]:
            own = replace(context, vocab_size=self.vocab_sizes[index])
            return flops_of(self.architectures[index], own), self.architectures[index].fingerprint

        ranked = sorted(often.tolist(), key=work)
        return [ranked[int((index + 0.5) * len(ranked) / _ANCHORS)] for index in range(_ANCHORS)]


def select(
    members: Sequence[Architecture], context: Context, config: LatencyConfig, seconds_per_flop: float, rng: Random
) -> Selection:
    """From random ``members`` of a space, on a machine of which the speed is roughly known."""

    def seconds(architecture: Architecture, own: Context) -> float:
        return seconds_per_flop * flops_of(architecture, own)

    whole = [seconds(member, context) for member in members]
    if sum(_measured_seconds(one, config.repeats) for one in whole) <= config.time_limit:
        held_out = np.arange(len(members)) % _HELD_OUT == _HELD_OUT - 1
        return Selection(list(members), [context.vocab_size] * len(members), held_out, config.repeats, shallow=False)

    spent = np.cumsum([2 * one for one in whole])  # one pass counts its load, one is timed
    affordable = int((spent <= _SHARE * config.time_limit).sum())
    few = max(_FEWEST_WHOLE, min(affordable, len(members) // _HELD_OUT))
    candidates = shallow([rng.choice(members) for _ in range(_CANDIDATES)], 2, rng)
    least = min(_SMALL_VOCABULARY, context.vocab_size)
    contexts = [
        replace(context, vocab_size=max(least, context.vocab_size >> rng.choice((0, 3, 6)))) for _ in candidates
    ]
    pairs = list(zip(candidates, contexts, strict=True))
    terms = np.stack([model_terms(a, Pricer(own).expected_uses(a), own) for a, own in pairs])
    times = np.array([_measured_seconds(seconds(a, own), FEWEST_ROUNDS) for a, own in pairs])
    left = config.time_limit - spent[few - 1]
    chosen = informative(terms, times, left, _FEWEST_SHALLOW, max(config.models, _FEWEST_SHALLOW))
    return Selection(
        [*(candidates[i] for i in chosen), *members[:few]],
        [*(contexts[i].vocab_size for i in chosen), *[context.vocab_size] * few],
        np.arange(len(chosen) + few) >= len(chosen),
        FEWEST_ROUNDS,
        shallow=True,
    )


def _measured_seconds(seconds: float, rounds: int) -> float:
    """A pass that counts the load, and ``rounds`` of measurements, beside anchors."""
    return seconds * (1 + rounds * passes_of(seconds) * (1 + 1 / ANCHOR_EVERY))


def shallow(architectures: Sequence[Architecture], most: int, rng: Random | None = None) -> list[Architecture]:
    """Each with at most ``most`` of the layers of each stack, consecutive ones; the first ones without ``rng``. An
    encoder has as many as its decoder reads."""
    found = []
    for architecture in architectures:
        stacks: dict[str, Stack] = {}
        least = 1
        for name, stack in reversed(architecture.stacks.items()):
            layers = stack.layers
            count = min(max(least, most if rng is None else rng.randint(1, most)), len(layers))
            first = 0 if rng is None else rng.randint(0, len(layers) - count)
            stacks[name] = replace(stack, layers=layers[first : first + count])
            least = max((layer.cross.span for layer in stacks[name].layers if layer.cross), default=1)
        found.append(replace(architecture, **stacks))
    return found


def flops_of(architecture: Architecture, context: Context) -> float:
    """Expected FLOPs of a pass."""
    return Pricer(context).expected(architecture)["flops"] * context.tokens
