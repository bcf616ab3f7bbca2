"""Which part of a parameter a slice uses. Each module defines it in one place, its method ``where``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """Ranges of rows, ``(start, stop)`` each, and the first ``columns`` of a matrix.

    ``summed``: the slice has one row per range, the sum of its rows.
    """

    rows: tuple[tuple[int, int], ...]
    columns: int | None = None
    summed: bool = False

    @staticmethod
    def first(rows: int, columns: int | None = None) -> Region:
        return Region(((0, rows),), columns)

    def of(self, tensor: Tensor) -> Tensor:
        """The region of ``tensor`` [N] or [N, D]: a view if its rows are one range and not summed, else a copy."""
        runs = [tensor[start:stop] if self.columns is None else tensor[start:stop, : self.columns]
                for start, stop in self.rows]  # fmt: skip
        if self.summed:
            lengths = torch.tensor([stop - start for start, stop in self.rows], device=tensor.device)
            return torch.segment_reduce(torch.cat(runs), "sum", lengths=lengths)
        return runs[0] if len(runs) == 1 else torch.cat(runs)


Regions = Mapping[str, Region]
"""By the name of the parameter."""


def inside(name: str, regions: Regions) -> dict[str, Region]:
    """The regions of a submodule ``name``, with the parameter names of its parent."""
    return {f"{name}.{own}": region for own, region in regions.items()}
