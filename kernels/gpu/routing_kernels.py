"""Device code of routing: two launches from router logits to sorted pairs, one for the gradient.

Symbols: T tokens, E experts (EP: next power of two), P pairs. A program owns one of at most ``CHUNKS`` chunks of
consecutive tokens and processes BT tokens at a time. Programs share only their counts per (chunk, expert). So no
atomics are needed and the order of the pairs is deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNKS = 128
"""About the number of multiprocessors of a large GPU; the second launch reads CHUNKS x E counts per program."""


@triton.jit
def choose(
    logits, probabilities, position, counts, tokens, experts, chunk, stride, max_experts, threshold,
    EP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Softmax in float32, then experts one by one in decreasing order of probability; ties go to the lower index.

    The first expert is always taken. Others are taken while the mass ranked strictly ahead is below ``threshold`` and
    fewer than ``max_experts`` are taken. ``position`` [T, E] becomes 1 where taken. The mass is summed in float64 and
    compared in float32, as ``torch.cumsum`` does on a CPU.
    """
    lane = tl.arange(0, EP)
    load = tl.zeros([EP], dtype=tl.int32)
    begin = tl.program_id(0) * chunk
    for start in range(begin, tl.minimum(begin + chunk, tokens), BT):
        token = start + tl.arange(0, BT)
        inside = (token < tl.minimum(begin + chunk, tokens))[:, None] & (lane < experts)[None, :]
        z = tl.load(logits + token.to(tl.int64)[:, None] * stride + lane[None, :], mask=inside, other=0.0)
        z = tl.where(lane[None, :] < experts, z.to(tl.float32), float("-inf"))
        p = tl.exp(z - tl.max(z, axis=1)[:, None])
        p = p / tl.sum(p, axis=1)[:, None]
        taken = tl.zeros([BT, EP], dtype=tl.int32)
        mass = tl.zeros([BT], dtype=tl.float64)
        wanted = tl.full([BT], 1, tl.int32)
        rank = 0
        while (rank < max_experts) & (tl.max(wanted) > 0):
            left = tl.where((taken == 0) & (lane < experts)[None, :], p, -1.0)
            best = tl.argmax(left, axis=1, tie_break_left=True)
            this = (lane[None, :] == best[:, None]) & (wanted > 0)[:, None]
            taken = tl.where(this, 1, taken)
            mass += tl.sum(tl.where(this, p, 0.0), axis=1).to(tl.float64)
            wanted = ((wanted > 0) & (mass.to(tl.float32) < threshold)).to(tl.int32)
            rank += 1
        place = token.to(tl.int64)[:, None] * experts + lane[None, :]
        tl.store(probabilities + place, p, mask=inside)
        tl.store(position + place, taken, mask=inside)
        load += tl.sum(tl.where(inside, taken, 0), axis=0)
    tl.store(counts + tl.program_id(0) * EP + lane, load)


@triton.jit
def place(
    probabilities, position, counts, pair_tokens, offsets, weights, slots, token_offsets,
    tokens, experts, chunk, chunks,
    NORMALISE: tl.constexpr, EP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Stable counting sort of the pairs by expert. ``position`` becomes a pair's index, -1 where there is none."""
    lane = tl.arange(0, EP)
    total = tl.zeros([EP], dtype=tl.int32)
    ahead = tl.zeros([EP], dtype=tl.int32)  # pairs of earlier chunks
    for start in range(0, chunks, BC):
        row = start + tl.arange(0, BC)
        count = tl.load(counts + row[:, None] * EP + lane[None, :], mask=(row < chunks)[:, None], other=0)
        total += tl.sum(count, axis=0)
        ahead += tl.sum(tl.where((row < tl.program_id(0))[:, None], count, 0), axis=0)
    first = tl.cumsum(total, axis=0) - total
    if tl.program_id(0) == 0:
        tl.store(offsets + lane, first.to(tl.int64), mask=lane < experts)
        tl.store(offsets + experts, tl.sum(total).to(tl.int64))
        tl.store(token_offsets + tokens, tl.sum(total))
    following = first + ahead
    slot = tl.sum(ahead)
    begin = tl.program_id(0) * chunk
    for start in range(begin, tl.minimum(begin + chunk, tokens), BT):
        token = start + tl.arange(0, BT)
        exists = token < tl.minimum(begin + chunk, tokens)
        inside = exists[:, None] & (lane < experts)[None, :]
        at = token.to(tl.int64)[:, None] * experts + lane[None, :]
        p = tl.load(probabilities + at, mask=inside, other=0.0)
        taken = tl.load(position + at, mask=inside, other=0)
        index = following[None, :] + tl.cumsum(taken, axis=0) - taken
        count = tl.sum(taken, axis=1)
        token_slot = slot + tl.cumsum(count, axis=0) - count
        weight = p
        if NORMALISE:
            kept = tl.sum(tl.where(taken > 0, p, 0.0), axis=1)
            weight = p / tl.where(count > 0, kept, 1.0)[:, None]
        pair = taken > 0
        tl.store(pair_tokens + index, tl.broadcast_to(token.to(tl.int64)[:, None], [BT, EP]), mask=pair)
        tl.store(slots + index, token_slot[:, None] + tl.cumsum(taken, axis=1) - taken, mask=pair)
        tl.store(weights + index, weight, mask=pair)
        tl.store(position + at, tl.where(pair, index, -1), mask=inside)
        tl.store(token_offsets + token, token_slot, mask=exists)
        following += tl.sum(taken, axis=0)
        slot += tl.sum(count)


@triton.jit
def backward(
    probabilities, position, grad_weights, grad_probabilities, grad_logits, tokens, experts,
    NORMALISE: tl.constexpr, BALANCE: tl.constexpr, EP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits through the pairs' weights and, with BALANCE, through the probabilities.

    If a token has one expert, the denominator of its weight counts as a constant (``kernels.routing.route``).
    """
    lane = tl.arange(0, EP)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = (token < tokens)[:, None] & (lane < experts)[None, :]
    at = token.to(tl.int64)[:, None] * experts + lane[None, :]
    p = tl.load(probabilities + at, mask=inside, other=0.0)
    index = tl.load(position + at, mask=inside, other=-1)
    grad = tl.load(grad_weights + index, mask=index >= 0, other=0.0)
    if NORMALISE:
        total = tl.sum(tl.where(index >= 0, p, 0.0), axis=1)
        count = tl.sum((index >= 0).to(tl.int32), axis=1)
        through_total = tl.where(count > 1, tl.sum(grad * p, axis=1) / (total * total), 0.0)
        total = tl.where(count > 0, total, 1.0)
        grad = tl.where(index >= 0, grad / total[:, None] - through_total[:, None], 0.0)
    if BALANCE:
        grad += tl.load(grad_probabilities + at, mask=inside, other=0.0)
    grad = p * (grad - tl.sum(p * grad, axis=1)[:, None])
    tl.store(grad_logits + at, grad.to(grad_logits.dtype.element_ty), mask=inside)
