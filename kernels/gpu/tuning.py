"""Tile shapes of the kernels: candidates per kernel and rows per tile, chosen by Triton's autotuner on the device.

The autotuning key is the width and the logarithms of hidden size and rows, so a batch of another size or a
supernet's next architecture is not tuned again. Choices are kept in Triton's cache across processes. Without tuning
(``MOESAIC_AUTOTUNE=0``, or Triton's interpreter) the first candidate of each list runs.
experiments/kernels/compile.py records registers, shared memory and spills of every candidate.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
import triton
from triton import knobs

from moesaic.kernels.workspace import ROW_TILES


def _shapes(*rows: tuple[int, int, int, int]) -> list[triton.Config]:
    """Configs from (BN, BK, warps, stages)."""
    return [triton.Config({"BN": n, "BK": k}, num_warps=w, num_stages=s) for n, k, w, s in rows]


_SMALL = _shapes((128, 64, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3))
_BY_ROWS = {
    16: _SMALL,
    32: _SMALL,
    64: _shapes((128, 64, 4, 4), (64, 64, 4, 4), (256, 64, 8, 3)),
    128: _shapes((128, 64, 8, 4), (256, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 4)),
}
_NO_WIDE_ROWS = {**_BY_ROWS, 128: _shapes((128, 64, 8, 4), (128, 64, 8, 3), (128, 32, 8, 4))}
_WEIGHTS = [
    triton.Config({"BM": m, "BN": n, "BK": k}, num_warps=w, num_stages=s)
    for m, n, k, w, s in ((128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (128, 128, 32, 8, 4), (128, 256, 64, 8, 3))
]
_Candidates = dict[str, dict[int, list[triton.Config]]]

HOPPER: _Candidates = {
    "hidden": _BY_ROWS,
    "hidden_gelu": {
        **_NO_WIDE_ROWS,
        16: _SMALL[:2],
        32: _shapes((128, 64, 4, 4), (64, 128, 4, 3)),
    },
    "hidden_gated": {
        **_BY_ROWS,
        64: _shapes((64, 64, 4, 4), (128, 64, 8, 3), (128, 32, 8, 4)),
        128: _shapes((128, 64, 16, 3), (128, 32, 8, 4), (64, 64, 8, 4)),
    },
    "width_product": _BY_ROWS,
    "weight_backward": dict.fromkeys(ROW_TILES, _WEIGHTS),
}
"""Per product and rows per tile, from compute capability 9.0 on. Candidates that spilled registers were removed: a
gated product has two accumulators, and gelu a long epilogue."""
AMPERE: _Candidates = {
    **HOPPER,
    "hidden": _NO_WIDE_ROWS,
    "hidden_gelu": {
        **HOPPER["hidden_gelu"],
        64: _shapes((128, 64, 4, 4), (64, 32, 4, 4)),
        128: _shapes((128, 32, 8, 4), (64, 64, 8, 3)),
    },
    "hidden_gated": {
        **_BY_ROWS,
        64: _shapes((64, 64, 4, 3), (64, 32, 4, 4), (64, 64, 8, 3)),
        128: _shapes((64, 64, 8, 3), (64, 32, 8, 4), (64, 32, 8, 3)),
    },
    "width_product": _NO_WIDE_ROWS,
    "weight_backward": dict.fromkeys(ROW_TILES, _WEIGHTS[:3]),
}
"""The same before Hopper: operands pass through registers, so tiles are smaller."""


def hidden_candidates(pointwise: str, gated: bool) -> str:
    """The name of the candidates for a product that ends in the function ``pointwise``, with or without a gate."""
    if gated:
        return "hidden_gated"
    return "hidden_gelu" if pointwise.startswith("gelu") else "hidden"


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(knobs.runtime.interpret)


def candidates_here() -> _Candidates:
    """The table for the current device."""
    if interpreting():
        return HOPPER
    current: Any = triton.runtime.driver.active.get_current_target()
    return AMPERE if current.arch < 90 else HOPPER


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: exactly, unless torch is allowed TF32 as well."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def tune_key(width: int, columns: int, pairs: int) -> int:
    """The autotuning key, beside the dtypes and the row tile."""
    return (width << 12) | (columns.bit_length() << 6) | pairs.bit_length()


def _smaller(config: triton.Config, times: int, columns: int) -> triton.Config:
    """Less deep by ``times``, and at most ``columns`` wide."""
    shape = {
        **config.kwargs,
        "BK": max(16, config.kwargs["BK"] // times),
        "BN": min(columns, config.kwargs["BN"]),
    }
    return triton.Config(shape, num_warps=config.num_warps, num_stages=config.num_stages)


@lru_cache(maxsize=256)
def tuned(kernel: Any, name: str, rows: int, value_bytes: int) -> Any:
    """``kernel`` with the candidates for ``rows`` per tile. They are meant for 2-byte values; for larger values tiles
    shrink to fit into shared memory."""
    candidates = candidates_here()[name][rows]
    if value_bytes > 2:
        # A gated product has two accumulators and two weights at once.
        columns = 64 if name == "hidden_gated" else 256
        candidates = [_smaller(config, value_bytes // 2, columns) for config in candidates]
    if interpreting() or os.environ.get("MOESAIC_AUTOTUNE") == "0":
        candidates = candidates[:1]
    return triton.autotune(candidates, key=["tune"], cache_results=True)(kernel)
