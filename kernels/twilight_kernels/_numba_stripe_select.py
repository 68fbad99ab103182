"""Choosing the stripes of one strip from sampled rows (definition: ``_reference_prefill.select_stripes``).

The *lanes* of a strip are its sampled rows, head by head: lane ``g * samples + r``, in blocks of 64. Lanes without
a row weigh nothing.
"""

from __future__ import annotations

import numpy as np
from numba import carray, literally

from ._numba_numbers import (
    LOWEST,
    bits_float,
    f32_at,
    fast,
    float_bits,
    item_bytes,
    read_row,
    u8_at,
)
from ._numba_stripe_block import (
    ALPHA,
    DIM,
    FLOOR,
    KEYS,
    MASK,
    QUERY,
    REPORT,
    ROWS,
    SCALING,
    SINKS,
    STRIP,
    TOTAL,
    float_field,
    slab_start,
    strip_of,
)
from ._numba_stripe_lanes import add_rows, keep_columns, normalize_rows
from ._numba_strips import BLOCK, TILE, outer_product, softmax_tile

_LEVEL = 1 << 21  # as in the definition


@fast
def select_strip(kind, q_per_kv, samples, block, task, weights):
    """Mark the stripes of a task's strip and report on them; ``weights [blocks, keys, 64]`` is scratch."""
    literally(kind)
    literally(q_per_kv)
    literally(samples)
    row, kv_head, pad, start, end = strip_of(block, task)
    if start >= end:
        return
    rows, keys = np.empty(samples, np.int64), end + block[TOTAL] - block[ROWS] - pad
    count = sampled_rows(samples, block, start, end, pad, rows)
    dim, item = block[DIM], item_bytes(kind)
    query = np.zeros(((q_per_kv * samples + BLOCK - 1) // BLOCK, dim, BLOCK), np.float32)
    one = np.empty(dim, np.float32)
    for g in range(q_per_kv):
        head = block[QUERY] + item * (row * block[QUERY + 1] + (kv_head * q_per_kv + g) * block[QUERY + 2])
        for r in range(count):
            lane = g * samples + r
            read_row(kind, head + item * rows[r] * block[QUERY + 3], dim, one)
            query[lane // BLOCK, :, lane % BLOCK] = one
    tile = np.empty((TILE, dim), np.float32)
    base = block[KEYS] + item * (row * block[KEYS + 1] + kv_head * block[KEYS + 2] + pad * block[KEYS + 3])
    for first in range(0, keys, TILE):
        here = min(TILE, keys - first)
        for i in range(here):
            read_row(kind, base + item * (first + i) * block[KEYS + 3], dim, tile[i])
        for i in range(len(query)):
            outer_product(
                BLOCK, 0, tile.ctypes.data, dim, 1, here, dim, query[i].ctypes.data, weights[i, first:].ctypes.data
            )
    choose_stripes(q_per_kv, samples, block, task, rows, count, weights, keys)


@fast
def scratch(q_per_kv, samples, block):
    """Room for the weights of a strip; the last tile of keys may run over."""
    return np.empty(((q_per_kv * samples + BLOCK - 1) // BLOCK, block[TOTAL] + TILE, BLOCK), np.float32)


@fast
def sampled_rows(samples, block, start, end, pad, rows):
    """List the sampled query rows of a strip as ``StripePlan.sampled_rows`` does; return how many."""
    every, count = block[STRIP] // samples, 0
    lead = block[TOTAL] - block[ROWS] - pad
    for row in range(start, end):
        if (lead + row + 1) % every == 0 or row == end - 1:
            rows[count] = row
            count += 1
    return count


@fast
def choose_stripes(q_per_kv, samples, block, task, rows, count, weights, keys):
    """Turn the logits ``[blocks, key, lane]`` of sampled rows into weights, mark the stripes, report."""
    literally(q_per_kv)
    literally(samples)
    _, _, pad, start, _ = strip_of(block, task)
    offset = block[TOTAL] - block[ROWS]
    slab = slab_start(block, pad, start + offset) - pad
    sinks = min(block[SINKS], slab)
    base, column = np.zeros((len(weights), BLOCK), np.float32), np.zeros(keys, np.float32)
    scaling = np.float32(float_field(block, SCALING))
    for i in range(len(weights)):
        _softmax(q_per_kv, samples, i, rows, count, offset - pad, scaling, weights[i], keys, column)
        add_rows(weights[i].ctypes.data, sinks, base[i].ctypes.data)
        add_rows(weights[i, slab:].ctypes.data, keys - slab, base[i].ctypes.data)
    mass = column[sinks:slab]
    largest = np.float32(0)
    for key in range(slab - sinks):
        largest = max(largest, mass[key])
    level, mean, least = _level(q_per_kv, samples, block, count, base, weights, sinks, mass, largest)
    bar = bits_float(np.uint32(level * _LEVEL))
    marks = carray(u8_at(block[MASK] + task * ((block[TOTAL] + 7) // 8)), ((block[TOTAL] + 7) // 8,))
    stripes = 0
    for key in range(slab - sinks):
        if mass[key] >= bar and mass[key] > 0:
            place = key + sinks + pad
            marks[place >> 3] |= np.uint8(1 << (place & 7))
            stripes += 1
    report = carray(f32_at(block[REPORT] + 16 * task), (4,))
    report[0], report[1] = stripes, base.sum() / (q_per_kv * count)
    report[2], report[3] = mean, least


@fast
def _softmax(q_per_kv, samples, index, rows, count, lead, scaling, weights, keys, column):
    """Turn a block's logits ``[key, lane]`` into weights, nothing behind a row's own position; add up its columns."""
    literally(q_per_kv)
    literally(samples)
    top, total, shrink = np.full(BLOCK, LOWEST, np.float32), np.zeros(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for key in range(lead + rows[0] + 1, keys):
        for lane in range(BLOCK):
            r = (index * BLOCK + lane) % samples
            if r < count and key > lead + rows[r]:
                weights[key, lane] = LOWEST
    softmax_tile(0, weights.ctypes.data, keys, scaling, top.ctypes.data, total.ctypes.data, shrink.ctypes.data)
    for lane in range(BLOCK):
        is_row = (index * BLOCK + lane) % samples < count and index * BLOCK + lane < q_per_kv * samples
        total[lane] = np.float32(1) / total[lane] if is_row else np.float32(0)
    normalize_rows(weights.ctypes.data, keys, total.ctypes.data, column.ctypes.data)


@fast
def _level(q_per_kv, samples, block, count, base, weights, sinks, mass, largest):
    """Find the highest bar at which rows keep enough; return it with the mean and 5 % quantile kept."""
    alpha, floor = float_field(block, ALPHA), float_field(block, FLOOR)
    high = np.int64(float_bits(largest)) // _LEVEL + 1
    low, kept = np.int64(0), np.empty(base.shape, np.float32)
    _keep(q_per_kv, samples, count, base, weights, sinks, mass, high, kept)
    mean, least = _judge(q_per_kv, samples, count, kept)
    if alpha < 1.0 and mean >= alpha and least >= floor:
        return high, mean, least
    while high - low > 1:
        middle = (low + high) // 2
        _keep(q_per_kv, samples, count, base, weights, sinks, mass, middle, kept)
        mean, least = _judge(q_per_kv, samples, count, kept)
        if alpha < 1.0 and mean >= alpha and least >= floor:
            low = middle
        else:
            high = middle
    _keep(q_per_kv, samples, count, base, weights, sinks, mass, low, kept)
    mean, least = _judge(q_per_kv, samples, count, kept)
    return low, mean, least


@fast
def _keep(q_per_kv, samples, count, base, weights, sinks, mass, level, kept):
    """Write what each lane keeps of the columns whose mass without the lane's own row reaches a level's bar."""
    literally(q_per_kv)
    literally(samples)
    bar = bits_float(np.uint32(level * _LEVEL)) if level > 0 else np.float32(-1)
    kept[:] = base
    keep_columns(
        q_per_kv, samples, weights[0, sinks:].ctypes.data, 4 * weights[0].size, mass.ctypes.data, len(mass),
        np.float32(1) if count > 1 else np.float32(0), bar, kept.ctypes.data,
    )  # fmt: skip


@fast
def _judge(q_per_kv, samples, count, kept):
    """Mean and 5 % quantile over the lanes that have a row."""
    ordered = np.empty(q_per_kv * count, np.float32)
    for g in range(q_per_kv):
        first = g * samples % BLOCK
        ordered[g * count : (g + 1) * count] = kept[g * samples // BLOCK, first : first + count]
    ordered.sort()
    return ordered.sum() / len(ordered), ordered[max(1, round(0.05 * len(ordered))) - 1]
