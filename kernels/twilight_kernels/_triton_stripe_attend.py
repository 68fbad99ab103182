"""Attention of strips to their stripes and window on GPUs: lists of keys first, then flash attention over them.

A strip's keys are a list (sinks and stripes, which all its rows see) and a slab (the window and the strip itself,
where a row sees nothing behind its own position). One online softmax runs over both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_strips import load_rows, place_strip, place_stripes


@triton.jit
def list_kernel(
    mask, padding, listed, lengths, first_strip, strips, rows, total,
    KV_HEADS: tl.constexpr, STRIP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, SPAN: tl.constexpr,
    SINK_SPAN: tl.constexpr,
):  # fmt: skip
    """List the sinks and the marked keys of a strip and KV head, in order."""
    strip, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = first_strip + strip
    pad, _, first, end = place_strip(padding, task // KV_HEADS, n, rows, total, STRIP)
    if first >= end:
        return
    low, high = place_stripes(pad, first, WINDOW, SINKS)
    place = task * tl.num_programs(0) + strip
    listed += place * total
    mask += (task * strips + n) * ((total + 7) // 8)
    sink = tl.arange(0, SINK_SPAN)
    tl.store(listed + sink, pad + sink, mask=pad + sink < low)
    length = low - pad
    for at in range(low // 8 * 8, high, SPAN):
        key = at + tl.arange(0, SPAN)
        byte = tl.load(mask + key // 8, mask=key < high, other=0).to(tl.int32)
        is_in = (((byte >> (key % 8)) & 1) != 0) & (key >= low) & (key < high)
        tl.store(listed + length + tl.cumsum(is_in.to(tl.int32), 0) - 1, key, mask=is_in)
        length += tl.sum(is_in.to(tl.int32), 0)
    tl.store(lengths + place, length)


@triton.jit
def attend_kernel(
    query, keys, values, padding, listed, lengths, out, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch,
    v_head, v_row, o_batch, o_head, o_row, first_strip, rows, total, factor,
    KV_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STRIP: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SLAB_S: tl.constexpr,
    LIST_STAGES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend ``BLOCK_T`` rows of one query head; heads that share keys and rows of a strip are neighbours.

    Three loops: whole tiles of the list, tiles of the slab that all rows see, and what is left of both, masked.
    """
    head, part = tl.program_id(0) % Q_PER_KV, tl.program_id(0) // Q_PER_KV
    strip = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest first
    task = tl.program_id(2).to(tl.int64)
    b, k = task // KV_HEADS, task % KV_HEADS
    pad, start, first, end = place_strip(padding, b, first_strip + strip, rows, total, STRIP)
    _, slab = place_stripes(pad, first, WINDOW, SINKS)
    lowest = start + part * BLOCK_T
    end = tl.minimum(end, lowest + BLOCK_T)
    if (first >= end) | (lowest >= end):
        return
    position = lowest + tl.arange(0, BLOCK_T)
    is_row = (position >= first) & (position < end)
    position = tl.maximum(position, first)  # lines that are no rows see something, so that no sum is zero
    index = position - (total - rows)
    head += k * Q_PER_KV
    tile = load_rows(query + b * q_batch + head * q_head, index, is_row, q_row, DIM, BLOCK_D)
    keys += b * k_batch + k * k_head
    values += b * v_batch + k * v_head
    place = task * tl.num_programs(1) + strip
    listed += place * total
    length = tl.load(lengths + place)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_T,), tl.float32)
    total_out = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    listed_tiles = length // BLOCK_S * BLOCK_S
    for at in tl.range(0, listed_tiles, BLOCK_S, num_stages=LIST_STAGES):
        key = tl.load(listed + at + tl.arange(0, BLOCK_S))
        top, mass, total_out = _fold(
            tile, None, keys, values, key, None, k_row, v_row, factor, top, mass, total_out,
            DIM, VALUE_DIM, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
    slab_tiles = slab + (tl.maximum(first, lowest) - slab) // SLAB_S * SLAB_S
    for at in range(slab, slab_tiles, SLAB_S):
        top, mass, total_out = _fold(
            tile, None, keys, values, at + tl.arange(0, SLAB_S), None, k_row, v_row, factor, top, mass, total_out,
            DIM, VALUE_DIM, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
    rest = tl.cdiv(length - listed_tiles, SLAB_S) * SLAB_S
    for at in tl.range(0, rest + end - slab_tiles, SLAB_S, num_stages=2):
        entry = listed_tiles + at + tl.arange(0, SLAB_S)
        key = tl.load(listed + entry, mask=entry < length, other=total)
        key = tl.where(at < rest, key, slab_tiles - rest + at + tl.arange(0, SLAB_S))
        top, mass, total_out = _fold(
            tile, position, keys, values, key, key < end, k_row, v_row, factor, top, mass, total_out,
            DIM, VALUE_DIM, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
    channel = tl.arange(0, BLOCK_V)
    out += b * o_batch + head * o_head
    to = out + index.to(tl.int64)[:, None] * o_row + channel[None, :]
    result = (total_out / mass[:, None]).to(out.dtype.element_ty)
    tl.store(to, result, mask=is_row[:, None] & (channel < VALUE_DIM)[None, :])


@triton.jit
def _fold(
    tile, position, keys, values, key, is_there, k_row, v_row, factor, top, mass, total,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take a tile of keys into the online softmax; each row has seen a key by the end of the first tile.

    Rows without a ``position`` see all of them; otherwise keys that are not there lie behind all positions.
    """
    found = load_rows(keys, key, is_there, k_row, DIM, BLOCK_D)
    logits = tl.dot(tile, tl.trans(found), input_precision=PRECISION)
    if position is not None:
        logits = tl.where(key[None, :] <= position[:, None], logits, float("-inf"))
    what = load_rows(values, key, is_there, v_row, VALUE_DIM, BLOCK_V)
    higher = tl.maximum(top, tl.max(logits, 1))
    unit = higher * factor
    weights = tl.exp2(logits * factor - unit[:, None])
    shrink = tl.exp2(top * factor - unit)
    mass = mass * shrink + tl.sum(weights, 1)
    total = total * shrink[:, None] + tl.dot(weights.to(what.dtype), what, input_precision=PRECISION)
    return higher, mass, total
