"""Which rows of a layer's bank an architecture's experts take: the sharing policies."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
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

    Raises
    ------
    ValueError : the bank cannot hold ``part``.
    """
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
