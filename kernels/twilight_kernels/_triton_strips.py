"""Strips of query rows on GPUs, as ``StripePlan`` enumerates them, from lengths that stay on the device.

Positions count from the first key of a batch row, padding included.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_strip(padding, b, n, rows, total, STRIP: tl.constexpr):
    """Say where strip ``n`` of batch row ``b`` is.

    Returns:
        The padding, where the strip's grid begins, its first position that is a query row, and the position after its
        last; there is no such strip if the last two are not in order.
    """
    pad = tl.load(padding + b)
    start = (first_number(pad, rows, total, STRIP) + n) * STRIP + pad
    return pad, start, tl.maximum(start, total - rows), tl.minimum(start + STRIP, total)


@triton.jit
def first_number(pad, rows, total, STRIP: tl.constexpr):
    """Strips of real tokens before the first that has query rows."""
    return tl.maximum(total - rows - pad, 0) // STRIP


@triton.jit
def place_group(padding, b, group, first_strip, rows, total, STRIP: tl.constexpr, STRIPS: tl.constexpr):
    """Say where group ``group`` of the strips from ``first_strip`` on is; which strips share one never changes.

    Returns:
        The padding, where the group begins, and how many strips after ``first_strip`` that is; below zero if the
        group holds earlier ones too.
    """
    pad = tl.load(padding + b)
    before = first_number(pad, rows, total, STRIP) + first_strip
    number = (before // STRIPS + group) * STRIPS
    return pad, number * STRIP + pad, number - before


@triton.jit
def place_stripes(pad, first, WINDOW: tl.constexpr, SINKS: tl.constexpr):
    """First key that may be a stripe of the strip at ``first``, behind the sinks, and the first of its window."""
    slab = tl.maximum(pad, first - WINDOW)
    return tl.minimum(pad + SINKS, slab), slab


@triton.jit
def load_sampled(
    query, chunk, start, first, end, lead, row_stride, head_stride,
    Q_PER_KV: tl.constexpr, DIM: tl.constexpr, STRIP: tl.constexpr, SAMPLES: tl.constexpr, SLOTS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_D: tl.constexpr, STRIPS: tl.constexpr = 1,
):  # fmt: skip
    """Load sampled rows of ``HEADS`` query heads, line ``(strip * HEADS + head) * SLOTS + slot``.

    ``start``, ``first``, ``end`` are those of the strip, or of each line's.

    Returns:
        The rows ``[STRIPS * HEADS * SLOTS, BLOCK_D]``, their positions, and which of the lines are rows.
    """
    line = tl.arange(0, STRIPS * HEADS * SLOTS)
    slot, head = line % SLOTS, chunk * HEADS + line // SLOTS % HEADS
    every: tl.constexpr = STRIP // SAMPLES
    position = tl.minimum(start + (slot + 1) * every - 1, end - 1)
    is_row = (slot < SAMPLES) & (position >= first) & (start + slot * every < end) & (head < Q_PER_KV)
    channel = tl.arange(0, BLOCK_D)
    place = query + head.to(tl.int64) * head_stride + (position - lead).to(tl.int64) * row_stride
    is_there = is_row[:, None] & (channel < DIM)[None, :]
    return tl.load(place[:, None] + channel[None, :], mask=is_there, other=0.0), position, is_row


@triton.jit
def load_rows(tensor, index, is_there, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows ``index`` of ``tensor [S, DIM]``, zero where not ``is_there``; ``None`` says that all of them are."""
    channel = tl.arange(0, BLOCK_D)
    place = tensor + index.to(tl.int64)[:, None] * stride + channel[None, :]
    if is_there is not None:
        return tl.load(place, mask=is_there[:, None] & (channel < DIM)[None, :], other=0.0)
    elif DIM < BLOCK_D:
        return tl.load(place, mask=(channel < DIM)[None, :], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def load_tile(tensor, at, stride, DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows ``at .. at + BLOCK_S`` of ``tensor [S, DIM]``, all of which are there."""
    return load_rows(tensor + at * stride.to(tl.int64), tl.arange(0, BLOCK_S), None, stride, DIM, BLOCK_D)
