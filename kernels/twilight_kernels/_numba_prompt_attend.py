"""Attention of sixteen neighbouring rows of a prompt on matrix tiles, on CPUs (see ``_numba_prompt``).

A *strip* is sixteen rows: those of a tile, which holds one query head. The logits of all query heads of a KV head lie
in a buffer ``[q_per_kv, 16, columns]`` of the thread, sinks first, then packed pages, then the window.
"""

from __future__ import annotations

import numpy as np
from numba import carray, literally

from ._numba_amx import strip_product, tiles_off, tiles_on
from ._numba_ir import LANES
from ._numba_numbers import LOWEST, RAW_BF16, f32_at, f64_at, fast, u16_at, write_row
from ._numba_prompt_block import (
    BUFFER_BYTES,
    BUFFERS,
    COLUMNS,
    FIRST_HEAD,
    HEADS,
    KEY_DIM,
    KV_HEADS,
    MIN_KEEP,
    MIN_SPARSE_LEN,
    OUT,
    PACKED_BLOCKS,
    PAGE_SIZE,
    QUERY,
    QUERY_HEAD,
    QUERY_ROW,
    ROWS,
    SCALING,
    SINK_BLOCKS,
    SINKS,
    START,
    STATS,
    STRIP,
    TILES,
    VALUE_DIM,
    WINDOW_START,
    P,
    float_field,
    keys_of,
    row_end,
    row_pages,
    values_of,
    wide,
    wide_value,
)
from ._numba_prompt_lanes import keep_columns, raise_tops, range_of_lanes, sum_of_row, weigh_row, weight_of
from ._numba_prompt_prune import SMALLEST, smallest_kept
from ._numba_rows import largest_of_vectors

_LOG2E = 1.4426950408889634
_STEP = 32  # columns that one tile instruction sums over


@fast
def attend_strip(q_per_kv, block, task, thread):
    """Attend the rows of a strip to what each of them sees."""
    literally(q_per_kv)
    head, first = task % block[HEADS], task // block[HEADS] * STRIP
    rows = min(STRIP, block[ROWS] - first)
    last, page_size = first + rows - 1, block[PAGE_SIZE]
    sinks = COLUMNS * block[SINK_BLOCKS]
    packed = (row_pages(block, last) * page_size + COLUMNS - 1) // COLUMNS * COLUMNS
    begin = row_pages(block, first) * page_size // COLUMNS * COLUMNS  # of the window, after the sinks
    window = (row_end(block, last) - begin + COLUMNS - 1) // COLUMNS * COLUMNS
    columns = sinks + packed + window
    behind = COLUMNS * (block[SINK_BLOCKS] + block[PACKED_BLOCKS] - block[WINDOW_START]) + begin  # of the window
    stride = columns + LANES  # in numbers; no multiple of a memory page, of which a cache keeps few
    buffer = block[BUFFERS] + thread * block[BUFFER_BYTES]
    logits = carray(f32_at(buffer), (q_per_kv, STRIP, stride))
    near = carray(f32_at(buffer + 4 * q_per_kv * STRIP * stride), (packed + LANES,))
    tops = np.full((q_per_kv, STRIP, LANES), LOWEST, np.float32)
    alive = np.zeros(columns // _STEP, np.uint8)
    totals = np.empty((q_per_kv, STRIP), np.float32)
    out = np.empty((q_per_kv, STRIP, wide_value(block[VALUE_DIM])), np.float32)
    tiles_on(block[TILES])
    _score(q_per_kv, block, head, first, rows, logits, sinks, packed, window, begin, behind, tops)
    sums, trials = np.empty((q_per_kv, LANES), np.float32), np.empty((3, LANES), np.float32)
    limits, own = np.full((2, q_per_kv), SMALLEST, np.float32), np.empty((2, q_per_kv), np.int64)
    peaks = np.empty((4, q_per_kv), np.float32)
    for r in range(rows):
        row = first + r
        _weigh(q_per_kv, block, row, logits[:, r], sinks, packed, begin, tops[:, r], peaks)
        pages = row_pages(block, row)
        is_sparse = float_field(block, P) < 1.0 and pages > 0 and pages * page_size >= block[MIN_SPARSE_LEN]
        limits[1] = SMALLEST
        if is_sparse:
            _find_limits(q_per_kv, block, row, logits[:, r], sinks, peaks, near, trials, limits[1])
        sums[:, :] = 0
        own[:, :] = 0
        kept = _keep(q_per_kv, logits[:, r], sinks, packed, window, limits, sums, own, alive)
        for g in range(q_per_kv):
            totals[g, r] = sum_of_row(sums[g].ctypes.data)
        if block[STATS] != 0:
            _count(q_per_kv, block, head, row, is_sparse, own[1], kept, totals[:, r], peaks)
    _sum_values(q_per_kv, block, head, logits, sinks + packed, window, behind, alive, out)
    tiles_off()
    _write(q_per_kv, block, head, first, rows, out, totals)


@fast
def _score(q_per_kv, block, head, first, rows, logits, sinks, packed, window, begin, behind, tops):
    """Write the logits of a strip, and the largest in each lane of those packed columns that all its rows see."""
    literally(q_per_kv)
    key_wide, key_dim, stride = wide(block[KEY_DIM]), block[KEY_DIM], logits.shape[2]
    query = np.zeros((q_per_kv, STRIP, key_wide), np.uint16)
    for g in range(q_per_kv):
        for r in range(rows):
            index = (first + r) * block[QUERY_ROW] + ((block[FIRST_HEAD] + head) * q_per_kv + g) * block[QUERY_HEAD]
            source = carray(u16_at(block[QUERY] + 2 * index), (key_dim,))
            for d in range(key_dim):
                query[g, r, d] = source[d]
    for start in range(0, sinks + packed + window, COLUMNS):
        column = start if start < sinks + packed else start - sinks - packed + behind
        keys = keys_of(block, head) + 2 * column * key_wide
        for g in range(q_per_kv):
            out = logits[g].ctypes.data + 4 * start
            strip_product(
                4, 0, 0, query[g].ctypes.data, 2 * key_wide, key_wide // _STEP, 0, keys, 4 * COLUMNS, out, 4 * stride
            )
            if sinks <= start < sinks + begin:
                raise_tops(4, rows, out, 4 * stride, tops[g].ctypes.data)


@fast
def _weigh(q_per_kv, block, row, logits, sinks, packed, begin, tops, peaks):
    """Turn a row's logits into weights, zero where it sees nothing.

    ``peaks [4, q_per_kv]`` receives the largest packed weight, a weight that sixteen packed ones reach, and the sums of
    packed and of plain weights.
    """
    factor = np.float32(float_field(block, SCALING) * _LOG2E)
    own, plain = row_pages(block, row) * block[PAGE_SIZE], sinks + packed
    seen, end = min(block[SINKS], block[START] + row + 1), plain + row_end(block, row) - begin
    for g in range(q_per_kv):
        line = logits[g]
        address = line.ctypes.data
        for start in range(begin, own, LANES):
            raise_tops(1, 1, address + 4 * (sinks + start), 0, tops[g].ctypes.data)
        line[seen:sinks] = LOWEST
        line[plain : plain + own - begin] = LOWEST
        columns = line.size - LANES
        line[end:columns] = LOWEST
        top, least = range_of_lanes(tops[g].ctypes.data)
        peak = max(top, largest_of_vectors(address, sinks // LANES))
        peak = max(peak, largest_of_vectors(address + 4 * plain, (columns - plain) // LANES))
        peaks[0, g], peaks[1, g] = weight_of(top, factor, peak), weight_of(least, factor, peak)
        peaks[2, g] = weigh_row(address + 4 * sinks, own // LANES, factor, peak)
        peaks[3, g] = weigh_row(address, sinks // LANES, factor, peak)
        peaks[3, g] += weigh_row(address + 4 * plain, (columns - plain) // LANES, factor, peak)
        line[sinks + own : plain] = 0


@fast
def _find_limits(q_per_kv, block, row, weights, sinks, peaks, near, trials, limits):
    """Find the smallest packed weight that each query head keeps."""
    p, count = np.float32(float_field(block, P)), row_pages(block, row) * block[PAGE_SIZE]
    for g in range(q_per_kv):
        total = peaks[2, g] + peaks[3, g]
        limits[g] = smallest_kept(
            weights[g].ctypes.data + 4 * sinks, count // LANES, peaks[0, g], peaks[1, g], (np.float32(1) - p) * total,
            p * total - peaks[3, g], min(block[MIN_KEEP], count), near, trials,
        )  # fmt: skip


@fast
def _keep(q_per_kv, weights, sinks, packed, window, limits, sums, own, alive):
    """Leave a row's kept weights as bfloat16, where tiles read them; return how many packed columns are kept."""
    literally(q_per_kv)
    address, head_bytes, flags = weights[0].ctypes.data, weights.strides[0], alive.ctypes.data
    plain, bounds, added, counts = limits[0].ctypes.data, limits[1].ctypes.data, sums.ctypes.data, own[1].ctypes.data
    others = own[0].ctypes.data
    keep_columns(q_per_kv, address, head_bytes, sinks // _STEP, address, plain, added, others, flags)
    at, flags = sinks, flags + sinks // _STEP
    kept = keep_columns(
        q_per_kv, address + 4 * at, head_bytes, packed // _STEP, address + 2 * at, bounds, added, counts, flags
    )
    at, flags = at + packed, flags + packed // _STEP
    keep_columns(q_per_kv, address + 4 * at, head_bytes, window // _STEP, address + 2 * at, plain, added, others, flags)
    return kept


@fast
def _sum_values(q_per_kv, block, head, logits, packed, window, behind, alive, out):
    """Sum the values of a strip by their weights; ``packed`` columns with the sinks, then ``window`` of them."""
    value_wide, line = wide_value(block[VALUE_DIM]), 4 * logits.shape[2]
    values, out_line = values_of(block, head), 4 * out.shape[2]
    later, flags = values + 2 * behind * value_wide, alive.ctypes.data
    for g in range(q_per_kv):
        weights = logits[g].ctypes.data
        for d in range(0, value_wide, LANES):
            place, at = out[g].ctypes.data + 4 * d, 4 * d
            if value_wide - d >= 4 * LANES and d % (4 * LANES) == 0:
                strip_product(
                    4, 0, 1, weights, line, packed // _STEP, flags, values + at, 4 * value_wide, place, out_line
                )
                strip_product(
                    4, 1, 1, weights + 2 * packed, line, window // _STEP, flags + packed // _STEP, later + at,
                    4 * value_wide, place, out_line,
                )  # fmt: skip
            elif d >= value_wide // (4 * LANES) * (4 * LANES):
                strip_product(
                    1, 0, 1, weights, line, packed // _STEP, flags, values + at, 4 * value_wide, place, out_line
                )
                strip_product(
                    1, 1, 1, weights + 2 * packed, line, window // _STEP, flags + packed // _STEP, later + at,
                    4 * value_wide, place, out_line,
                )  # fmt: skip


@fast
def _write(q_per_kv, block, head, first, rows, out, totals):
    """Write the rows' sums over their weights."""
    value_dim, heads = block[VALUE_DIM], block[KV_HEADS] * q_per_kv
    for g in range(q_per_kv):
        for r in range(rows):
            inverse = np.float32(1) / totals[g, r]
            for d in range(value_dim):
                out[g, r, d] *= inverse
            place = (first + r) * heads + (block[FIRST_HEAD] + head) * q_per_kv + g
            write_row(RAW_BF16, block[OUT] + 2 * place * value_dim, value_dim, out[g, r])


@fast
def _count(q_per_kv, block, head, row, is_sparse, own, kept, totals, peaks):
    """Add to the caller's counters, see ``prompt_attention``."""
    heads = block[KV_HEADS] * q_per_kv
    stats = carray(f64_at(block[STATS]), (block[ROWS] * heads, 5))
    count = row_pages(block, row) * block[PAGE_SIZE]
    for g in range(q_per_kv):
        place = row * heads + (block[FIRST_HEAD] + head) * q_per_kv + g
        stats[place, 0] += count
        stats[place, 1] += own[g] if is_sparse else count
        stats[place, 2] += kept if is_sparse else count
        stats[place, 3] += totals[g] / (peaks[2, g] + peaks[3, g]) if is_sparse else 1
        stats[place, 4] += count
