"""Device code of the grouped products: one program computes one tile of one expert's matrix product.

Symbols: P pairs sorted by expert, D width, F hidden size of an expert (largest: the row stride of hidden buffers).
A row tile is BM consecutive pairs of one expert; ``tiles`` lists them, packed by ``pack_row_tiles``. A program exits
at once if its tile does not exist (the list has room for the worst case) or lies past its expert's last column.

For Triton's interpreter, values are cast to ACC (float32) right after a load; only ``tl.dot`` sees bfloat16. Row
indices become int64 before they are multiplied by a stride.
"""

from __future__ import annotations

import triton
import triton.language as tl

_EXPERTS = tl.constexpr(1024)


@triton.jit
def pack_row_tiles(tiles, offsets, experts, capacity, BM: tl.constexpr, EP: tl.constexpr, BT: tl.constexpr):
    """Program e writes the row tiles of expert e as ``row tile * 1024 + expert``; the last one pads with -1."""
    expert = tl.program_id(0)
    lanes = tl.arange(0, EP)
    load = tl.load(offsets + lanes + 1, mask=lanes < experts, other=0)
    load -= tl.load(offsets + lanes, mask=lanes < experts, other=0)
    counts = tl.cdiv(load, BM).to(tl.int32)
    first = tl.sum(tl.where(lanes < expert, counts, 0))
    count = tl.sum(tl.where(lanes == expert, counts, 0))
    steps = tl.arange(0, BT)
    for start in range(0, count, BT):
        index = start + steps
        tl.store(tiles + first + index, index * _EXPERTS + expert, mask=index < count)
    if expert == experts - 1:
        for start in range(first + count, capacity, BT):
            tl.store(tiles + start + steps, tl.full([BT], -1, tl.int32), mask=start + steps < capacity)


@triton.jit
def _row_tile(packed, offsets, BM: tl.constexpr):
    """Expert of a packed tile, index of its first pair (int64), and which of its BM pairs are the expert's."""
    expert = packed % _EXPERTS
    first = tl.load(offsets + expert).to(tl.int64) + packed // _EXPERTS * BM
    return expert, first, first + tl.arange(0, BM) < tl.load(offsets + expert + 1)


@triton.jit
def _pointwise(z, NAME: tl.constexpr):
    """f(z) and f'(z) of the function NAME of ``kernels.activations``; ``none`` is f(z) = z.

    A result that the caller does not use is not compiled. For relu, z may also be f(z): both results are the same.
    """
    if NAME == "relu":
        value = tl.where(z < 0.0, 0.0, z)  # and NaN stays NaN, so that divergence is visible
        slope = (z > 0.0).to(z.dtype)
    elif NAME == "gelu":
        phi = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))  # standard normal distribution function
        value = z * phi
        slope = phi + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif NAME == "gelu_tanh":
        # (1 + tanh(y)) / 2 is the sigmoid of 2 y, here with 2 y = 2 sqrt(2 / pi) * (z + 0.044715 z^3).
        sigmoid = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
        value = z * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif NAME == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        value = z * sigmoid
        slope = sigmoid * (1.0 + z - value)
    else:
        tl.static_assert(NAME == "none")
        value = z
        slope = tl.full(z.shape, 1.0, z.dtype)
    return value, slope


@triton.jit
def _gathered_product(
    x, indices, stride_x, weight, second, bank_rows, stride_weight, acc, acc_second,
    D: tl.constexpr, TWO: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + x[indices] @ weight[bank_rows].T over the D columns of both, which are contiguous.

    TWO does the same with ``second`` for the rows of x that are already loaded.
    """
    depth = tl.arange(0, BK)
    left = x + indices[:, None] * stride_x + depth[None, :]
    places = bank_rows[None, :] * stride_weight + depth[:, None]
    for k in range(0, D, BK):
        if D % BK == 0:
            a = tl.load(left)
            b = tl.load(weight + places)
        else:
            a = tl.load(left, mask=k + depth[None, :] < D, other=0.0)
            b = tl.load(weight + places, mask=k + depth[:, None] < D, other=0.0)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION, out_dtype=acc.dtype)
        if TWO:
            if D % BK == 0:
                b = tl.load(second + places)
            else:
                b = tl.load(second + places, mask=k + depth[:, None] < D, other=0.0)
            acc_second = tl.dot(a, b.to(a.dtype), acc_second, input_precision=PRECISION, out_dtype=acc.dtype)
        left += BK
        places += BK
    return acc, acc_second


@triton.jit
def hidden_product(
    x, tokens, up, gate, up_bias, hidden, pre_up, pre_gate, offsets, starts, sizes, tiles,
    stride_x, stride_weight, stride_hidden,
    max_columns, tune,
    D: tl.constexpr, POINTWISE: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """hidden [P, F] = activation(x[tokens] @ up.T + up_bias), with fused gather and activation.

    ``gate`` and ``up_bias`` may be None. So may ``pre_up`` and ``pre_gate``, which receive the pre-activations for the
    backward pass. With POINTWISE ``none`` this is also the backward pass's product of the gradient with ``down``.
    """
    column_tiles = tl.cdiv(max_columns, BN)
    packed = tl.load(tiles + tl.program_id(0) // column_tiles)
    if packed < 0:
        return
    expert, first, valid = _row_tile(packed, offsets, BM)
    first_column = tl.program_id(0) % column_tiles * BN
    size = tl.multiple_of(tl.load(sizes + expert), ALIGNED)
    if first_column >= size:
        return
    columns = first_column + tl.arange(0, BN)
    # Rows and columns past the end read existing ones instead. Their results are not stored, so loads need no mask.
    indices = tl.load(tokens + first + tl.arange(0, BM), mask=valid, other=0).to(tl.int64)
    bank_rows = (tl.load(starts + expert) + tl.minimum(columns, size - 1)).to(tl.int64)
    zeros = tl.zeros([BM, BN], dtype=ACC)
    a = zeros
    if up_bias is not None:
        a += tl.load(up_bias + bank_rows).to(ACC)[
            None, :
        ]  # the sum starts with the bias: adding it at the end would spill registers
    a, g = _gathered_product(
        x, indices, stride_x, up, gate, bank_rows, stride_weight, a, zeros,
        D, gate is not None, BK, PRECISION,
    )  # fmt: skip
    places = tl.arange(0, BM)[:, None] * stride_hidden + columns[None, :]  # in the tile's rows, which are together
    base = first * stride_hidden
    mask = valid[:, None] & (columns < size)[None, :]
    if pre_up is not None:
        tl.store(pre_up + base + places, a.to(pre_up.dtype.element_ty), mask=mask)
    if pre_gate is not None:
        tl.store(pre_gate + base + places, g.to(pre_gate.dtype.element_ty), mask=mask)
    if gate is not None:
        value, _ = _pointwise(g, POINTWISE)
        h = a * value
    else:
        h, _ = _pointwise(a, POINTWISE)
    tl.store(hidden + base + places, h.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def _inner_product(
    hidden, valid, stride_hidden, weight, start, size, columns, stride_weight, acc,
    D: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + hidden[:, :size] @ weight[start : start + size, columns]."""
    neurons = tl.arange(0, BK)
    left = hidden + tl.arange(0, BM)[:, None] * stride_hidden + neurons[None, :]
    right = weight + start.to(tl.int64) * stride_weight + neurons[:, None] * stride_weight + columns[None, :]
    for k in range(0, size, BK):
        # Rows of other experts are read but not stored; columns past the end were never written and are masked.
        if ALIGNED % BK == 0:
            a = tl.load(left, mask=valid[:, None], other=0.0)
            b = tl.load(right, mask=(columns < D)[None, :], other=0.0)
        else:
            a = tl.load(left, mask=valid[:, None] & (k + neurons < size)[None, :], other=0.0)
            b = tl.load(right, mask=(k + neurons < size)[:, None] & (columns < D)[None, :], other=0.0)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION, out_dtype=acc.dtype)
        left += BK
        right += BK * stride_weight
    return acc


@triton.jit
def width_product(
    hidden, second, weight, second_weight, scale, slots, out, offsets, starts, sizes, tiles,
    stride_hidden, stride_weight,
    tune, D: tl.constexpr, TWO: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[slots] [P, D] = hidden @ weight (+ second @ second_weight), times the pair's ``scale``.

    Rows are stored in token order, so that the sum over a token's experts reads adjacent rows. ``ALIGNED`` divides
    every expert's size; where BK divides ``ALIGNED``, the inner loop needs no mask.
    """
    column_tiles = tl.cdiv(D, BN)
    packed = tl.load(tiles + tl.program_id(0) // column_tiles)
    if packed < 0:
        return
    expert, first, valid = _row_tile(packed, offsets, BM)
    columns = tl.program_id(0) % column_tiles * BN + tl.arange(0, BN)
    size = tl.multiple_of(tl.load(sizes + expert), ALIGNED)
    start = tl.load(starts + expert)
    acc = _inner_product(
        hidden + first * stride_hidden, valid, stride_hidden, weight, start, size, columns, stride_weight,
        tl.zeros([BM, BN], dtype=ACC), D, ALIGNED, BM, BK, PRECISION,
    )  # fmt: skip
    if TWO:
        acc = _inner_product(
            second + first * stride_hidden, valid, stride_hidden, second_weight, start, size, columns, stride_weight,
            acc, D, ALIGNED, BM, BK, PRECISION,
        )  # fmt: skip
    if SCALED:
        acc *= tl.load(scale + first + tl.arange(0, BM), mask=valid, other=0.0).to(ACC)[:, None]
    places = tl.load(slots + first + tl.arange(0, BM), mask=valid, other=0).to(tl.int64)
    mask = valid[:, None] & (columns < D)[None, :]
    tl.store(out + places[:, None] * D + columns[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def combine(pairs, token_offsets, out, tokens, D: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """out [T, D]: each token's rows of ``pairs``, summed in the order of its experts and so deterministic."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    exists = token < tokens
    first = tl.load(token_offsets + token, mask=exists, other=0)
    count = tl.load(token_offsets + token + 1, mask=exists, other=0) - first
    acc = tl.zeros([BT, BD], dtype=ACC)
    for i in range(0, tl.max(count)):
        mask = (i < count)[:, None] & (column < D)[None, :]
        acc += tl.load(pairs + (first + i).to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0).to(ACC)
    mask = exists[:, None] & (column < D)[None, :]
    tl.store(out + token.to(tl.int64)[:, None] * D + column[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def activation_backward(
    grad_hidden, kept, pre_gate, scale, grad_gate, scaled, grad_scale, offsets, sizes, tiles,
    stride_hidden,
    POINTWISE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """From q = grad[tokens] @ down.T to gradients of the pre-activations, hidden values times weight, grad_scale.

    The gradient of a hidden value is scale * q, that of a pair's scale the sum of q * hidden over its neurons. Hidden
    values are recomputed from ``kept``, the pre-activations of ``up`` (hidden values for relu), and ``pre_gate``,
    None without a gate. The gradient of ``up``'s pre-activation overwrites q. Fused into the product, this kernel
    would spill registers; it moves 4 to 6 values per hidden value.
    """
    packed = tl.load(tiles + tl.program_id(0))
    if packed < 0:
        return
    expert, first, valid = _row_tile(packed, offsets, BM)
    size = tl.multiple_of(tl.load(sizes + expert), ALIGNED)
    base = first * stride_hidden
    pairs = first + tl.arange(0, BM)
    s = tl.load(scale + pairs, mask=valid, other=0.0).to(ACC)[:, None]
    sum_scale = tl.zeros([BM], dtype=ACC)
    for start in range(0, size, BN):
        columns = start + tl.arange(0, BN)
        places = tl.arange(0, BM)[:, None] * stride_hidden + columns[None, :]
        mask = valid[:, None] & (columns < size)[None, :]
        q = tl.load(grad_hidden + base + places, mask=mask, other=0.0).to(ACC)
        a = tl.load(kept + base + places, mask=mask, other=0.0).to(ACC)
        if pre_gate is not None:
            g = tl.load(pre_gate + base + places, mask=mask, other=0.0).to(ACC)
            value, slope_gate = _pointwise(g, POINTWISE)
            tl.store(grad_gate + base + places, (s * q * a * slope_gate).to(grad_gate.dtype.element_ty), mask=mask)
            h, slope = a * value, value
        else:
            h, slope = _pointwise(a, POINTWISE)
        tl.store(grad_hidden + base + places, (s * q * slope).to(grad_hidden.dtype.element_ty), mask=mask)
        tl.store(scaled + base + places, (s * h).to(scaled.dtype.element_ty), mask=mask)
        sum_scale += tl.sum(q * h, axis=1)
    tl.store(grad_scale + pairs, sum_scale.to(grad_scale.dtype.element_ty), mask=valid)


@triton.jit
def weight_backward(
    left, right, tokens, out, offsets, starts, sizes, stride_left, stride_right, stride_out,
    max_columns, tune, D: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[start : start + size, :D] = left[pairs, :size].T @ right[tokens[pairs]] for one expert's BM neurons.

    Written directly into the bank's gradient, since experts share no row. An expert without pairs gets zeros.
    """
    neuron_tiles, width_tiles = tl.cdiv(max_columns, BM), tl.cdiv(D, BN)
    tile = tl.program_id(0)
    expert = tile // (neuron_tiles * width_tiles)
    first_neuron = tile // width_tiles % neuron_tiles * BM
    size = tl.multiple_of(tl.load(sizes + expert), ALIGNED)
    if first_neuron >= size:
        return
    neurons = first_neuron + tl.arange(0, BM)
    columns = tile % width_tiles * BN + tl.arange(0, BN)
    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    kept, inside = (neurons < size)[:, None], (columns < D)[None, :]
    acc = tl.zeros([BM, BN], dtype=ACC)
    for k in range(begin, end, BK):
        rows = k + tl.arange(0, BK)
        valid = rows < end
        indices = tl.load(tokens + rows, mask=valid, other=0).to(tl.int64)
        # Both sides are masked: values past the end may be infinite, and 0 * inf is not 0.
        a = tl.load(
            left + rows.to(tl.int64)[None, :] * stride_left + neurons[:, None], mask=kept & valid[None, :], other=0.0
        )
        b = tl.load(right + indices[:, None] * stride_right + columns[None, :], mask=valid[:, None] & inside, other=0.0)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION, out_dtype=ACC)
    places = (tl.load(starts + expert) + neurons).to(tl.int64)[:, None] * stride_out + columns[None, :]
    tl.store(out + places, acc.to(out.dtype.element_ty), mask=kept & inside)


@triton.jit
def bias_backward(
    left, out, offsets, starts, sizes, stride_left, max_columns,
    ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[start : start + size] = sum of left[pairs, :size] over the pairs of one expert, for BN of its neurons.

    Separate from ``weight_backward``, which has no registers to spare; so ``left`` is read once more. The order of
    the sum is fixed. An expert without pairs gets zeros.
    """
    neuron_tiles = tl.cdiv(max_columns, BN)
    expert = tl.program_id(0) // neuron_tiles
    neurons = tl.program_id(0) % neuron_tiles * BN + tl.arange(0, BN)
    kept = neurons < tl.load(sizes + expert)
    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    acc = tl.zeros([BM, BN], dtype=ACC)
    for k in range(begin, end, BM):
        rows = k + tl.arange(0, BM)
        places = rows.to(tl.int64)[:, None] * stride_left + neurons[None, :]
        acc += tl.load(left + places, mask=(rows < end)[:, None] & kept[None, :], other=0.0).to(ACC)
    tl.store(out + tl.load(starts + expert) + neurons, tl.sum(acc, axis=0).to(out.dtype.element_ty), mask=kept)
