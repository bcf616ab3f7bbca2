"""The sparse layer without gradients, for a dense layer or a single token: as few operations as possible.

A decoding step is bound by reading weights and by the start of operations. A dense layer is three products; of a sparse
one, the rows of the token's experts are first copied into one buffer, which stays in the cache. The buffer is kept
between calls, because first use of memory takes about four times as long as the copy itself.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from torch import Tensor

from moesaic.kernels.activations import ACTIVATIONS
from moesaic.kernels.layout import Bank, ExpertLayout, Routing
from moesaic.kernels.segments import hidden_values
from moesaic.kernels.workspace import gathers_rows

_kept = threading.local()


def applies(x: Tensor, bank: Bank, layout: ExpertLayout, routing: Routing | None) -> bool:
    """Whether ``sparse_ffn`` here computes this call: no gradient, and a dense layer or one token of small experts."""
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    return routing is None or (x.dtype == bank.up.dtype and gathers_rows(len(x), layout.sizes))


def sparse_ffn(x: Tensor, bank: Bank, layout: ExpertLayout, routing: Routing | None, activation: str) -> Tensor:
    """See ``kernels.sparse_ffn``."""
    if routing is None:
        start, size = layout.segments[0]
        return _dense(x, bank, slice(start, start + size), activation)
    chosen = routing.offsets.diff().nonzero()[:, 0]
    if not len(chosen):
        return torch.zeros_like(x)
    rows = _rows(layout, chosen)
    width = x.shape[1]

    def product(matrix: Tensor, transposed: bool, left: Tensor) -> Tensor:
        picked = torch.index_select(matrix[:, :width], 0, rows, out=_buffer(x, len(rows)))
        return left @ (picked if transposed else picked.T)

    gate = None if bank.gate is None else product(bank.gate, False, x)
    up = product(bank.up, False, x)
    if bank.up_bias is not None:
        up = up + bank.up_bias[rows]
    hidden = hidden_values(up, gate, ACTIVATIONS[activation])
    sizes = torch.tensor(layout.sizes)[chosen]
    return product(bank.down, True, hidden.mul_(routing.weights.to(x.dtype).repeat_interleave(sizes)))


def release() -> None:
    """Free the buffer that this thread keeps: that of the largest model so far."""
    _kept.__dict__.clear()


def _dense(x: Tensor, bank: Bank, rows: slice, activation: str) -> Tensor:
    columns = slice(0, x.shape[1])
    up, down = bank.up[rows, columns].to(x.dtype), bank.down[rows, columns].to(x.dtype)
    gate = None if bank.gate is None else torch.mm(x, bank.gate[rows, columns].to(x.dtype).T)
    bias = None if bank.up_bias is None else bank.up_bias[rows].to(x.dtype)
    values = torch.mm(x, up.T) if bias is None else torch.addmm(bias, x, up.T)
    return torch.mm(hidden_values(values, gate, ACTIVATIONS[activation]), down)


def _rows(layout: ExpertLayout, chosen: Tensor) -> Tensor:
    """[n] the rows of the chosen experts."""
    table = _row_table(layout)
    if isinstance(table, Tensor):
        return table.index_select(0, chosen).flatten()
    return torch.cat([table[expert] for expert in chosen.tolist()])


@lru_cache(maxsize=4096)
def _row_table(layout: ExpertLayout) -> Tensor | list[Tensor]:
    """Rows of each expert; one tensor [E, n] where all have the same size."""
    with torch.inference_mode(False):
        rows = [torch.arange(start, start + size) for start, size in layout.segments]
        return torch.stack(rows) if len(set(layout.sizes)) == 1 else rows


def _buffer(x: Tensor, rows: int) -> Tensor:
    """Room for [rows, D] values, the same memory in every call of a thread; a tensor of ``inference_mode`` could not be
    written outside of it."""
    kept: dict[str, Tensor] = _kept.__dict__
    key, values = str(x.dtype), rows * x.shape[1]
    if key not in kept or kept[key].numel() < values:
        with torch.inference_mode(False):
            kept[key] = torch.empty(values, dtype=x.dtype)
    return kept[key][:values].view(rows, x.shape[1])
