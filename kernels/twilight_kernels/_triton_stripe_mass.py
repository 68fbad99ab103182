"""What sampled query rows attend to, on GPUs: their log-sum-exp, and the mass of every key that may be a stripe.

Two passes over the keys, because weights need their row's sum. Logarithms are to base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_strips import load_rows, load_sampled, place_strip, place_stripes


@triton.jit
def lse_kernel(
    query, keys, padding, lse, base, q_batch, q_head, q_row, k_batch, k_head, k_row, first_strip, rows, total, factor,
    KV_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, DIM: tl.constexpr, STRIP: tl.constexpr, SAMPLES: tl.constexpr,
    SLOTS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write each sampled row's log-sum-exp, infinite where there is no row, and its mass of sinks and window."""
    strip = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    task, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, k = task // KV_HEADS, task % KV_HEADS
    pad, start, first, end = place_strip(padding, b, first_strip + strip, rows, total, STRIP)
    if first >= end:
        return
    stripes, slab = place_stripes(pad, first, WINDOW, SINKS)
    tile, position, is_row = load_sampled(
        query + b * q_batch + k * Q_PER_KV * q_head, chunk, start, first, end, total - rows, q_row, q_head,
        Q_PER_KV, DIM, STRIP, SAMPLES, SLOTS, HEADS, BLOCK_D,
    )  # fmt: skip
    keys += b * k_batch + k * k_head
    top = tl.full((HEADS * SLOTS,), float("-inf"), tl.float32)
    mass = tl.zeros((HEADS * SLOTS,), tl.float32)
    top, mass = _add(tile, position, keys, k_row, slab, end, top, mass, factor, DIM, BLOCK_D, BLOCK_S, PRECISION)
    top, mass = _add(tile, position, keys, k_row, pad, stripes, top, mass, factor, DIM, BLOCK_D, BLOCK_S, PRECISION)
    always = top + tl.log2(mass)
    top, mass = _add(tile, position, keys, k_row, stripes, slab, top, mass, factor, DIM, BLOCK_D, BLOCK_S, PRECISION)
    whole = top + tl.log2(mass)
    line = chunk * HEADS * SLOTS + tl.arange(0, HEADS * SLOTS)
    place = (task * tl.num_programs(0) + strip) * (CHUNKS * HEADS * SLOTS) + line
    tl.store(lse + place, tl.where(is_row, whole, float("inf")))
    tl.store(base + place, tl.where(is_row, tl.exp2(always - whole), 0.0))


@triton.jit
def _add(
    tile, position, keys, stride, low, high, top, mass, factor,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add keys ``low .. high`` up to each row's own position to running softmax sums."""
    for at in range(low, high, BLOCK_S):
        key = at + tl.arange(0, BLOCK_S)
        found = load_rows(keys, key, key < high, stride, DIM, BLOCK_D)
        logits = tl.dot(tile, tl.trans(found), input_precision=PRECISION) * factor
        logits = tl.where((key < high)[None, :] & (key[None, :] <= position[:, None]), logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # a row that saw no key yet
        mass = mass * tl.exp2(top - level) + tl.sum(tl.exp2(logits - level[:, None]), 1)
        top = higher
    return top, mass


@triton.jit
def column_kernel(
    query, keys, padding, lse, column, q_batch, q_head, q_row, k_batch, k_head, k_row, first_strip, rows, total,
    factor,
    KV_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, DIM: tl.constexpr, STRIP: tl.constexpr, SAMPLES: tl.constexpr,
    SLOTS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SPAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the mass of ``SPAN`` keys that may be stripes of a strip, added up over its sampled rows."""
    strip = tl.program_id(1)
    task = tl.program_id(2).to(tl.int64)
    b, k = task // KV_HEADS, task % KV_HEADS
    pad, start, first, end = place_strip(padding, b, first_strip + strip, rows, total, STRIP)
    stripes, slab = place_stripes(pad, first, WINDOW, SINKS)
    low = stripes + tl.program_id(0) * SPAN
    high = tl.minimum(low + SPAN, slab)
    if (first >= end) | (low >= high):
        return
    keys += b * k_batch + k * k_head
    place = task * tl.num_programs(1) + strip
    column += place * total
    for chunk in range(CHUNKS):
        tile, _, _ = load_sampled(
            query + b * q_batch + k * Q_PER_KV * q_head, chunk, start, first, end, total - rows, q_row, q_head,
            Q_PER_KV, DIM, STRIP, SAMPLES, SLOTS, HEADS, BLOCK_D,
        )  # fmt: skip
        line = (place * CHUNKS + chunk) * (HEADS * SLOTS) + tl.arange(0, HEADS * SLOTS)
        whole = tl.load(lse + line)
        for at in range(low, high, BLOCK_S):
            key = at + tl.arange(0, BLOCK_S)
            found = load_rows(keys, key, key < high, k_row, DIM, BLOCK_D)
            weights = weigh(tile, found, whole, factor, PRECISION)
            mass = tl.sum(weights, 0)
            if chunk > 0:
                mass += tl.load(column + key, mask=key < high, other=0.0)
            tl.store(column + key, mass, mask=key < high)


@triton.jit
def weigh(tile, found, whole, factor, PRECISION: tl.constexpr):
    """Softmax weights of ``found`` keys, zero in lines that are no rows, as their ``whole`` is infinite."""
    return tl.exp2(tl.dot(tile, tl.trans(found), input_precision=PRECISION) * factor - whole[:, None])
