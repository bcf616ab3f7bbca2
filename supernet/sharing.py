"""Which rows of a layer's bank an architecture's experts take: the sharing policies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal

from moesaic.kernels import ExpertLayout
from moesaic.search_spaces import FeedForward

Sharing = Literal["nested", "packed"]


@lru_cache(maxsize=65536)
def expert_layout(envelope: FeedForward, part: FeedForward, sharing: Sharing) -> ExpertLayout:
    """Rows of the routed experts of ``part`` in the bank of ``envelope``.

    ``nested``: expert i owns a fixed region and uses its first rows, so a neuron always serves the same expert.
    ``packed``: experts follow one another from the first row, so small layouts share the most trained rows.
    Both agree when ``part`` is the envelope itself. Rows below ``envelope.shared_size`` belong to the shared expert.

    The bank of a layer that was dense (its router predicts activation mass) is ordered by importance, and its experts
    are the smallest ones possible. Whatever the policy, ``part`` then takes the first rows: its shared ones, and after
    them its experts, each of which is a run of the envelope's.

    Raises
    ------
    ValueError : the bank cannot hold ``part``.
    """
    if splits_dense(envelope):
        _whole_experts(envelope, part)
        return ExpertLayout(tuple(_starts(part)), part.expert_sizes)
    owners = envelope.expert_sizes if sharing == "nested" and part.experts > 1 else part.expert_sizes
    starts = tuple(accumulate(owners[: part.experts - 1], initial=envelope.shared_size))
    layout = ExpertLayout(starts, part.expert_sizes)
    fits = layout.starts[-1] + layout.sizes[-1] <= envelope.neurons and part.experts <= envelope.experts
    nests = part.experts == 1 or all(
        size <= room for size, room in zip(part.expert_sizes, envelope.expert_sizes, strict=False)
    )
    if not fits or not nests or part.shared_size > envelope.shared_size:
        raise ValueError(f"experts {part.expert_sizes} + {part.shared_size} exceed the bank of {envelope}")
    return layout


def splits_dense(envelope: FeedForward) -> bool:
    """Whether the bank holds the neurons of a layer that was dense."""
    return envelope.router is not None and envelope.router.predicts_mass


def envelope_experts(envelope: FeedForward, part: FeedForward) -> tuple[tuple[int, int], ...]:
    """(first, stop) of the envelope's experts that each routed expert of ``part`` consists of.

    Raises
    ------
    ValueError : an expert of ``part`` starts or ends inside one of the envelope's.
    """
    at = {start: index for index, start in enumerate((*_starts(envelope), envelope.neurons))}
    bounds = (*_starts(part), part.neurons)
    if any(bound not in at for bound in bounds):
        raise ValueError(f"experts {part.expert_sizes} + {part.shared_size} are no whole experts of {envelope}")
    return tuple((at[start], at[stop]) for start, stop in pairwise(bounds))


def _whole_experts(envelope: FeedForward, part: FeedForward) -> None:
    if part.router is not None:
        envelope_experts(envelope, part)
    elif part.neurons > envelope.neurons:
        raise ValueError(f"{part.neurons} neurons exceed the bank of {envelope}")


def _starts(part: FeedForward) -> Iterator[int]:
    """First row of each routed expert where all follow one another after the shared rows."""
    return accumulate(part.expert_sizes[:-1], initial=part.shared_size)
