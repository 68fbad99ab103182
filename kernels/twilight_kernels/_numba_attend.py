"""Weighted sums of value rows on CPUs, in partial results that merge by their log-sum-exp.

A *partial* is float32 ``[q_per_kv, value_dim + 2]``: weighted values, largest logit, sum of weights. The
scratch of a thread is that of ``_numba_score``, then ``weights [q_per_kv, 128] | scaled weights [groups,
q_per_kv, 128] | scale [128] | shift [128]``.
"""

from __future__ import annotations

import numpy as np
from numba import carray, literally

from ._numba_block import OUT, partial_of
from ._numba_lanes import value_rows
from ._numba_numbers import (
    ANY,
    RAW_BF16,
    f32_at,
    fast,
    fast_exp,
    half_to_float,
    i32_at,
    inlined,
    item_bytes,
    u16_at,
    write_row,
)

BLOCK_TOKENS = 128  # tokens whose weights are prepared at a time


@inlined
def scratch_size(key_dim, q_per_kv, value_dim, group_size):
    """Float32 numbers in the scratch of a thread."""
    groups = (value_dim + group_size - 1) // group_size
    return q_per_kv * (2 * key_dim + 1) + BLOCK_TOKENS * (q_per_kv * (1 + groups) + 2)


@inlined
def row_bytes_of(kind, value_dim):
    """Bytes of a value row."""
    return value_dim * kind // 8 if kind < RAW_BF16 else value_dim * item_bytes(kind)


@fast
def attend_rows(
    kind, q_per_kv, value_dim, group_size, base, lo, step, rows, count, logits, logit_stride, positions, partial,
    scratch, key_dim,
):  # fmt: skip
    """Add ``sum_i exp(logit_i - largest) * value_i`` over at most 128 tokens to a partial.

    ``rows`` (int64) are the tokens' value rows; ``logits`` is the address of the heads' logits, read at
    ``positions`` (address of int32) or, if that is 0, at ``0 .. count``.
    """
    literally(kind)
    literally(q_per_kv)
    literally(value_dim)
    literally(group_size)
    row_bytes = row_bytes_of(kind, value_dim)
    groups = (value_dim + group_size - 1) // group_size
    at = q_per_kv * (2 * key_dim + 1)
    weights = scratch[at : at + q_per_kv * BLOCK_TOKENS].reshape((q_per_kv, BLOCK_TOKENS))
    for g in range(q_per_kv):
        source = carray(f32_at(logits + 4 * g * logit_stride), (ANY,))
        partial[g, value_dim + 1] += _weights(source, positions, count, partial[g, value_dim], weights[g])
    offsets = rows[BLOCK_TOKENS:]
    for i in range(count):
        offsets[i] = rows[i] * row_bytes
    prepared = weights.ctypes.data
    if kind < RAW_BF16:
        at += q_per_kv * BLOCK_TOKENS
        scaled = scratch[at : at + groups * q_per_kv * BLOCK_TOKENS].reshape((groups, q_per_kv, BLOCK_TOKENS))
        at += groups * q_per_kv * BLOCK_TOKENS
        scale, shift = scratch[at : at + BLOCK_TOKENS], scratch[at + BLOCK_TOKENS : at + 2 * BLOCK_TOKENS]
        lows, steps = carray(u16_at(lo), (ANY,)), carray(u16_at(step), (ANY,))
        for c in range(groups):
            for i in range(count):
                scale[i] = half_to_float(steps[rows[i] * groups + c])
                shift[i] = half_to_float(lows[rows[i] * groups + c])
            for g in range(q_per_kv):
                moved = np.float32(0)
                for i in range(count):
                    scaled[c, g, i] = weights[g, i] * scale[i]
                    moved += weights[g, i] * shift[i]
                for d in range(c * group_size, min(value_dim, (c + 1) * group_size)):
                    partial[g, d] += moved
        prepared = scaled.ctypes.data
    value_rows(
        kind, q_per_kv, value_dim, group_size, base, offsets.ctypes.data, prepared, BLOCK_TOKENS, count,
        partial.ctypes.data, value_dim + 2,
    )  # fmt: skip


@fast
def _weights(source, positions, count, top, out):
    """Write ``exp(source - top)`` of the block's tokens; return their sum."""
    if positions == 0:
        for i in range(count):
            out[i] = source[i] - top
    else:
        where = carray(i32_at(positions), (ANY,))
        for i in range(count):
            out[i] = source[where[i]] - top
    total = np.float32(0)
    for i in range(count):
        out[i] = fast_exp(out[i])
        total += out[i]
    return total


@fast
def merge(dtype, q_per_kv, value_dim, block, head, merged):
    """Combine the first ``merged`` partials of a head by their log-sum-exp and write the output."""
    first = partial_of(block, head, 0, q_per_kv, value_dim)
    for g in range(q_per_kv):
        top = first[g, value_dim]
        for chunk in range(1, merged):
            top = max(top, partial_of(block, head, chunk, q_per_kv, value_dim)[g, value_dim])
        shrink = fast_exp(first[g, value_dim] - top)
        for d in range(value_dim):
            first[g, d] *= shrink
        first[g, value_dim + 1] *= shrink
        for chunk in range(1, merged):
            other = partial_of(block, head, chunk, q_per_kv, value_dim)
            if other[g, value_dim + 1] > 0:
                shrink = fast_exp(other[g, value_dim] - top)
                for d in range(value_dim):
                    first[g, d] += other[g, d] * shrink
                first[g, value_dim + 1] += other[g, value_dim + 1] * shrink
        inverse = np.float32(1) / first[g, value_dim + 1]
        for d in range(value_dim):
            first[g, d] *= inverse
        place = (head * q_per_kv + g) * value_dim
        write_row(dtype, block[OUT] + place * item_bytes(dtype), value_dim, first[g])
