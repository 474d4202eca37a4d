"""A few queries over many keys (flash decoding): pieces of the keys beside each other, then their weighted sum.

Queries of all heads that read one key-value head are rows of one tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_eval.engine.ops.fused.product import let_next_begin, overlapping, wait_for_previous

PIECE = 128  # keys of a program


# Compiled once, whatever the numbers of keys and of new tokens are.
@triton.jit(do_not_specialize=["num_slots", "num_new"])
def _piece_kernel(
    q_ptr, k_ptr, v_ptr, ends_ptr, sums_ptr, tops_ptr, totals_ptr,
    q_stride_b, q_stride_q, q_stride_s, k_stride_b, k_stride_j, k_stride_t, v_stride_b, v_stride_j, v_stride_t,
    num_slots, num_new, scale,
    BEHIND: tl.constexpr, SHARING: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PIECE: tl.constexpr, KEYS: tl.constexpr, NUM_HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    batch, head = (tl.program_id(0) // NUM_HEADS).to(tl.int64), tl.program_id(0) % NUM_HEADS
    piece, num_pieces = tl.program_id(2), tl.num_programs(2)
    rows, dims = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    real = rows < SHARING * num_new
    query, position = head * SHARING + rows // num_new, rows % num_new
    end = tl.load(ends_ptr + batch)
    q_at = batch * q_stride_b + query[:, None] * q_stride_q + position[:, None] * q_stride_s + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=real[:, None], other=0.0)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums = tl.zeros([ROWS, DIM], dtype=tl.float32)
    for start in tl.static_range(0, PIECE, KEYS):
        keys = piece * PIECE + start + tl.arange(0, KEYS)
        if BEHIND:  # the new keys lie behind all slots, and every query sees all of them
            seen = (keys < end) | ((keys >= num_slots) & (keys < num_slots + num_new))
            seen = real[:, None] & seen[None, :]
        else:  # they follow the context, and a query sees those up to its own
            seen = real[:, None] & (keys[None, :] <= end + position[:, None])
        there = (keys < num_slots + (num_new if BEHIND else 0))[:, None]
        k_at = batch * k_stride_b + head * k_stride_j + keys[:, None] * k_stride_t + dims[None, :]
        k = tl.load(k_ptr + k_at, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far
        weights = tl.exp(scores - base[:, None])
        shrunk = tl.exp(top - base)
        v_at = batch * v_stride_b + head * v_stride_j + keys[:, None] * v_stride_t + dims[None, :]
        v = tl.load(v_ptr + v_at, mask=there, other=0.0)
        sums = sums * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrunk + tl.sum(weights, axis=1)
        top = higher
    out = ((batch * NUM_HEADS * SHARING + query) * num_new + position) * num_pieces + piece
    tl.store(tops_ptr + out, top, mask=real)
    tl.store(totals_ptr + out, total, mask=real)
    tl.store(sums_ptr + out[:, None] * DIM + dims[None, :], sums, mask=real[:, None])


@triton.jit(do_not_specialize=["num_pieces", "num_positions", "num_queries"])
def _join_kernel(
    sums_ptr, tops_ptr, totals_ptr, out_ptr, num_pieces, num_positions, num_queries,
    DIM: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    row, dims = tl.program_id(0).to(tl.int64), tl.arange(0, DIM)
    highest = float("-inf")
    total, out = 0.0, tl.zeros([DIM], dtype=tl.float32)
    first = 0
    while first < num_pieces:
        pieces = first + tl.arange(0, AT_ONCE)
        there = pieces < num_pieces
        at = row * num_pieces + pieces
        tops = tl.load(tops_ptr + at, mask=there, other=float("-inf"))
        higher = tl.maximum(highest, tl.max(tops, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far
        shrunk, before = tl.exp(tops - base), tl.exp(highest - base)
        total = total * before + tl.sum(shrunk * tl.load(totals_ptr + at, mask=there, other=0.0), axis=0)
        sums = tl.load(sums_ptr + at[:, None] * DIM + dims[None, :], mask=there[:, None], other=0.0)
        out = out * before + tl.sum(sums * shrunk[:, None], axis=0)
        highest = higher
        first += AT_ONCE
    # From (B, Q, S) to the order (B, S, Q) of the output projection.
    position, query = row % num_positions, (row // num_positions) % num_queries
    to = ((row // (num_positions * num_queries)) * num_positions + position) * num_queries + query
    tl.store(out_ptr + to * DIM + dims, (out / total).to(out_ptr.dtype.element_ty))


def attend(q_BQSD: Tensor, k_BJTD: Tensor, v_BJTD: Tensor, ends_B: Tensor, num_slots: int, *, behind: bool) -> Tensor:
    """See :func:`twotower_eval.engine.ops.attention.attend_reference`."""
    batch_size, num_queries, num_new, dim = q_BQSD.shape
    num_heads = k_BJTD.shape[1]
    sharing = num_queries // num_heads
    q_BQSD, k_BJTD, v_BJTD = (t if t.stride(3) == 1 else t.contiguous() for t in (q_BQSD, k_BJTD, v_BJTD))
    num_pieces = triton.cdiv(num_slots + (num_new if behind else 0), PIECE)
    rows, all_rows = 16, batch_size * num_queries * num_new
    tops = torch.empty(all_rows, num_pieces, dtype=torch.float32, device=q_BQSD.device)
    sums = tops.new_empty(all_rows, num_pieces, dim)
    totals = torch.empty_like(tops)
    _piece_kernel[(batch_size * num_heads, triton.cdiv(sharing * num_new, rows), num_pieces)](
        q_BQSD, k_BJTD, v_BJTD, ends_B, sums, tops, totals,
        *q_BQSD.stride()[:3], *k_BJTD.stride()[:3], *v_BJTD.stride()[:3], num_slots, num_new, 1 / math.sqrt(dim),
        BEHIND=behind, SHARING=sharing, DIM=dim, ROWS=rows, PIECE=PIECE, KEYS=64, NUM_HEADS=num_heads,
        num_warps=4, num_stages=1, **overlapping(q_BQSD.device),
    )  # fmt: skip
    out_BSQD = torch.empty(batch_size, num_new, num_queries, dim, dtype=q_BQSD.dtype, device=q_BQSD.device)
    _join_kernel[(all_rows,)](
        sums, tops, totals, out_BSQD, num_pieces, num_new, num_queries,
        DIM=dim, AT_ONCE=16, num_warps=2, **overlapping(q_BQSD.device),
    )  # fmt: skip
    return out_BSQD.transpose(1, 2)
