"""What a forward pass of the sparse layer computes and allocates in each implementation, for models of its cost.

Needs neither triton nor the device, so a pass can be priced anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from moesaic.kernels.segments import BLOCK_ELEMENTS

Implementation = Literal["torch", "triton"]

_SMALL = 32
"""Most neurons of experts whose rows a decoding step copies together; of larger ones, a product each is faster."""

ROW_TILES = (16, 32, 64, 128)
"""Pairs per row tile of the Triton kernels. Below 64 Hopper's matrix units are underused, but a larger tile would be
mostly empty."""


def row_tile(pairs: int, experts: int) -> int:
    """Rows per tile of the Triton kernels for the mean load: the next power of two, within ``ROW_TILES``."""
    mean = pairs // max(1, experts)
    return next((rows for rows in ROW_TILES if rows >= mean), ROW_TILES[-1])


def product_rows(implementation: Implementation, tokens: int, experts: int, most: int) -> int:
    """An expert's product is computed in whole tiles of so many rows, if a token has at most ``most`` experts.

    A CPU's matrix library computes 16 rows at once.
    """
    return row_tile(tokens * most, experts) if implementation == "triton" else 16


def most_row_tiles(pairs: int, experts: int, rows: int) -> int:
    """Row tiles for any routing of ``pairs``: each expert's last tile may be partly filled."""
    return min(pairs, (pairs + experts * (rows - 1)) // rows)


def hidden_stride(sizes: tuple[int, ...] | list[int]) -> int:
    """Values between two rows of a Triton hidden buffer: the largest expert, rounded up to keep rows aligned."""
    return -(-max(sizes) // 16) * 16


def triton_bytes(tokens: int, width: int, sizes: tuple[int, ...], most: int, value_bytes: int) -> int:
    """Bytes of the hidden values [P, F], the rows [P, D] before they are combined, and the list of row tiles.

    Only the device knows how many pairs there are, so there is room for ``most`` per token.
    """
    pairs, experts = tokens * most, len(sizes)
    tiles = most_row_tiles(pairs, experts, row_tile(pairs, experts))
    return pairs * (hidden_stride(sizes) + width) * value_bytes + 4 * tiles


def gathered_values(pairs: float, largest: float, width: int) -> float:
    """Values of the buffer into which ``segments`` gathers a block of the ``pairs``; the most loaded expert has
    ``largest`` of them."""
    return min(pairs * width, max(BLOCK_ELEMENTS, largest * width))


def gathers_rows(tokens: int, sizes: Sequence[int]) -> bool:
    """Whether the torch implementation copies the rows of a token's experts into one buffer, without gradients."""
    return tokens == 1 and max(sizes) <= _SMALL
