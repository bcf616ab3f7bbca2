"""Two-way names: where the values of each of our parameters lie in the tensors of another program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Read = Callable[[str], Tensor]
"""A tensor by its name in a folder."""


@dataclass(frozen=True)
class Piece:
    """``rows`` (start, stop) of the tensor ``name``, which is ``transposed`` or made ``flat`` first; None: all.

    ``count``: how many rows of our parameter it is, where others follow it. ``added``: the name of a tensor whose first
    row is added to each of these; on the way back it is 0.
    """

    name: str
    transposed: bool = False
    rows: tuple[int, int] | None = None
    flat: bool = False
    count: int | None = None
    added: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors that it is made of."""
        return (self.name,) if self.added is None else (self.name, self.added)

    def renamed(self, rename: Callable[[str], str]) -> Piece:
        return replace(self, name=rename(self.name), added=self.added and rename(self.added))

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of the tensor: a view."""
        tensor = tensor.T if self.transposed else tensor.view(-1) if self.flat else tensor
        return tensor if self.rows is None else tensor[slice(*self.rows)]


Pieces = Sequence[Piece]
Names = Mapping[str, Pieces]
"""By the name of our parameter, the pieces that follow one another in it."""


def ours(pieces: Pieces, read: Read) -> Tensor:
    """The value of our parameter, as float32. One that is stored as it is stays a view of its memory-mapped file."""
    parts = [_value(piece, read) for piece in pieces]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _value(piece: Piece, read: Read) -> Tensor:
    value = piece.of(read(piece.name)).float()
    return value if piece.added is None else value + read(piece.added)[0].float()


def theirs(names: Names, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that ``names`` mention, from our parameters; rows that none has are 0."""
    found: dict[str, Tensor] = {}
    shapes = _shapes(names, parameters)
    for own, pieces in names.items():
        views = [piece.of(found.setdefault(piece.name, torch.zeros(shapes[piece.name]))) for piece in pieces]
        for view, part in zip(views, parameters[own].detach().split([len(view) for view in views]), strict=True):
            view.copy_(part)
        found |= {piece.added: torch.zeros(1, *parameters[own].shape[1:]) for piece in pieces if piece.added}
    return found


def _shapes(names: Names, parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for own, pieces in names.items():
        for piece in pieces:
            rows, *columns = parameters[own].shape
            rows = max(
                piece.rows[1] if piece.rows else piece.count or rows, shapes.get(f"rows of {piece.name}", (0,))[0]
            )
            shapes[f"rows of {piece.name}"] = (rows,)
            shapes[piece.name] = (1, rows) if piece.flat else (*columns, rows) if piece.transposed else (rows, *columns)
    return shapes
