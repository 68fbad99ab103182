"""Choosing the stripes of one strip from sampled rows (definition: ``_reference_prefill.select_stripes``).

The *lanes* of a strip are its sampled rows, head by head: lane ``g * samples + r``, in blocks of 64. Lanes without
a row weigh nothing.
"""

from __future__ import annotations

import numpy as np
from numba import carray, literally

from ._numba_numbers import (
    LOWEST,
    aligned,
    bits_float,
    f32_at,
    fast,
    float_bits,
    inlined,
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
from ._reference_prefill import RETRIEVED

_LEVEL = 1 << 21  # as in the definition
_LEVELS = 1024  # of float32
_RETRIEVED = np.float32(RETRIEVED)


@fast
def select_strip(kind, q_per_kv, samples, lanes, block, task, weights):
    """Mark the stripes of a task's strip and report on them.

    ``lanes`` are those of a block that may have a row; ``weights [blocks, keys, 64]`` is scratch.
    """
    literally(kind)
    literally(q_per_kv)
    literally(samples)
    literally(lanes)
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
    tile, logits = np.empty((TILE, dim), np.float32), np.empty((TILE, BLOCK), np.float32)
    state = running(weights)
    base = block[KEYS] + item * (row * block[KEYS + 1] + kv_head * block[KEYS + 2] + pad * block[KEYS + 3])
    for first in range(0, keys, TILE):
        here = min(TILE, keys - first)
        for i in range(here):
            read_row(kind, base + item * (first + i) * block[KEYS + 3], dim, tile[i])
        for i in range(len(query)):
            outer_product(lanes, 0, tile.ctypes.data, dim, 1, here, dim, query[i].ctypes.data, logits.ctypes.data)
            weigh_tile(samples, lanes, block, pad, i, rows, count, first, here, logits, weights[i], state[i])
    choose_stripes(q_per_kv, samples, lanes, block, task, count, weights, keys, state)


@fast
def running(weights):
    """State of a softmax over ``weights [blocks, keys, 64]``, rows of lanes.

    Row 0: the largest logit so far; row 1: the sum of weights; then, of each tile, what the sum shrank by.
    """
    blocks, rows = weights.shape[0], 2 + weights.shape[1] // TILE
    state = aligned(4 * blocks * rows * BLOCK).view(np.float32).reshape(blocks, rows, BLOCK)
    state[:] = 0
    state[:, 0] = LOWEST
    return state


@fast
def weigh_tile(samples, lanes, block, pad, index, rows, count, first, here, logits, weights, state):
    """Turn a tile's logits into weights below the largest so far, nothing behind a row's own position."""
    literally(samples)
    literally(lanes)
    lead = block[TOTAL] - block[ROWS] - pad
    for key in range(max(first, lead + rows[0] + 1), first + here):
        for lane in range(BLOCK):
            r = (index * BLOCK + lane) % samples
            if r < count and key > lead + rows[r]:
                logits[key - first, lane] = LOWEST
    softmax_tile(
        0, lanes, logits.ctypes.data, weights[first:].ctypes.data, here, np.float32(float_field(block, SCALING)),
        state[0].ctypes.data, state[1].ctypes.data, state[2 + first // TILE].ctypes.data,
    )  # fmt: skip


@fast
def scratch(q_per_kv, samples, block):
    """Room for the weights of a strip; the last tile of keys may run over."""
    blocks, keys = (q_per_kv * samples + BLOCK - 1) // BLOCK, block[TOTAL] + TILE
    return aligned(4 * blocks * keys * BLOCK).view(np.float32).reshape(blocks, keys, BLOCK)


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
def choose_stripes(q_per_kv, samples, lanes, block, task, count, weights, keys, state):
    """Finish the weights ``[blocks, key, lane]`` of sampled rows, mark the stripes, report."""
    literally(q_per_kv)
    literally(samples)
    literally(lanes)
    _, _, pad, start, _ = strip_of(block, task)
    slab = slab_start(block, pad, start + block[TOTAL] - block[ROWS]) - pad
    sinks = min(block[SINKS], slab)
    base, column = np.zeros((len(weights), BLOCK), np.float32), np.zeros(keys, np.float32)
    for i in range(len(weights)):
        _normalize(q_per_kv, samples, lanes, i, count, weights[i], keys, state[i], column)
        add_rows(lanes, weights[i].ctypes.data, sinks, base[i].ctypes.data)
        add_rows(lanes, weights[i, slab:].ctypes.data, keys - slab, base[i].ctypes.data)
    mass = column[sinks:slab]
    listed, reach = _by_level(mass)
    level, kept = _level(q_per_kv, samples, block, count, base, weights, sinks, mass, listed, reach)
    marks = carray(u8_at(block[MASK] + task * ((block[TOTAL] + 7) // 8)), ((block[TOTAL] + 7) // 8,))
    stripes = 0
    for key in listed[: reach[level]]:
        if mass[key] > 0:
            place = key + sinks + pad
            marks[place >> 3] |= np.uint8(1 << (place & 7))
            stripes += 1
    report = carray(f32_at(block[REPORT] + 20 * task), (5,))
    report[0], report[1] = stripes, base.sum() / (q_per_kv * count)
    report[2], report[3] = kept.sum() / len(kept), kept[_twentieth(kept)]
    report[4] = _retrievals(q_per_kv, samples, count, weights, sinks, mass, listed, reach) / len(kept)


@fast
def _normalize(q_per_kv, samples, lanes, index, count, weights, keys, state, column):
    """Divide a block's weights by their sums, tile by tile from the last, and add up its columns."""
    literally(q_per_kv)
    literally(samples)
    literally(lanes)
    total = state[1]
    for lane in range(BLOCK):
        is_row = (index * BLOCK + lane) % samples < count and index * BLOCK + lane < q_per_kv * samples
        total[lane] = np.float32(1) / total[lane] if is_row else np.float32(0)
    for tile in range((keys - 1) // TILE, -1, -1):
        first = tile * TILE
        normalize_rows(
            lanes, weights[first:].ctypes.data, min(TILE, keys - first), total.ctypes.data, column[first:].ctypes.data
        )
        for lane in range(BLOCK):
            total[lane] *= state[2 + tile, lane]


@fast
def _by_level(mass):
    """List the columns by the level of their mass, highest first; ``reach[level]`` of them have it or a higher one."""
    reach = np.zeros(_LEVELS + 1, np.int32)
    for key in range(len(mass)):
        reach[_level_of(mass[key])] += 1
    for level in range(_LEVELS - 1, -1, -1):
        reach[level] += reach[level + 1]
    place, listed = reach[1:].copy(), np.empty(len(mass), np.int32)
    for key in range(len(mass)):
        level = _level_of(mass[key])
        listed[place[level]] = key
        place[level] += 1
    return listed, reach


@inlined
def _level_of(mass):
    return (np.int64(float_bits(mass)) // _LEVEL) & (_LEVELS - 1)


@fast
def _level(q_per_kv, samples, block, count, base, weights, sinks, mass, listed, reach):
    """Find the highest bar at which rows keep enough; return its level and what they keep, in ascending order.

    The search starts where the rows would keep enough if each were judged by its own columns too, which is near,
    and each look costs the columns above the bar only.
    """
    alpha, floor = float_field(block, ALPHA), float_field(block, FLOOR)
    high = np.int64(0)
    while reach[high] > 0:
        high += 1
    if alpha >= 1.0:
        return np.int64(0), _keep(q_per_kv, samples, count, base, weights, sinks, mass, listed, reach, np.int64(0))
    wanted, level, at = np.float32(alpha * q_per_kv * count) - base.sum(), high, 0
    while level > 0 and wanted > 0:
        level -= 1
        while at < reach[level]:
            wanted -= mass[listed[at]]
            at += 1
    low, step, best = np.int64(-1), np.int64(1), base[0]
    high += 1  # from here on: low is enough or unknown (-1), high is not enough
    while high - low > 1:
        kept = _keep(q_per_kv, samples, count, base, weights, sinks, mass, listed, reach, level)
        if level == 0 or (kept.sum() / len(kept) >= alpha and kept[_twentieth(kept)] >= floor):
            low, best = level, kept
        else:
            high = level
        if low < 0:
            level, step = max(np.int64(0), high - step), 2 * step
        else:
            level = min((low + high) // 2, low + step)
            step = 2 * step
    return low, best


@fast
def _retrievals(q_per_kv, samples, count, weights, sinks, mass, listed, reach):
    """Count lanes that find a quarter of their mass in one key which is mostly theirs; only heavy columns can be it."""
    literally(q_per_kv)
    literally(samples)
    retrieves = np.zeros((q_per_kv, samples), np.uint8)
    for key in listed[: reach[_level_of(_RETRIEVED)]]:
        for r in range(count):
            own = np.float32(0)
            for g in range(q_per_kv):
                own += weights[(g * samples + r) // BLOCK, sinks + key, (g * samples + r) % BLOCK]
            if own > np.float32(0.5) * mass[key]:
                for g in range(q_per_kv):
                    if weights[(g * samples + r) // BLOCK, sinks + key, (g * samples + r) % BLOCK] >= _RETRIEVED:
                        retrieves[g, r] = 1
    return retrieves.sum()


@inlined
def _twentieth(kept):
    """Index of the 5 % quantile, as in the definition."""
    return max(1, round(0.05 * len(kept))) - 1


@fast
def _keep(q_per_kv, samples, count, base, weights, sinks, mass, listed, reach, level):
    """What lanes keep of the columns whose mass without their own row reaches a level, in ascending order."""
    literally(q_per_kv)
    literally(samples)
    bar = bits_float(np.uint32(level * _LEVEL)) if level > 0 else np.float32(-1)
    kept = base.copy()
    keep_columns(
        q_per_kv, samples, weights[0, sinks:].ctypes.data, 4 * weights[0].size, mass.ctypes.data, listed.ctypes.data,
        reach[level], np.float32(1) if count > 1 else np.float32(0), bar, kept.ctypes.data,
    )  # fmt: skip
    ordered, lanes = np.empty(q_per_kv * count, np.float32), kept.reshape(kept.size)
    for g in range(q_per_kv):
        for r in range(count):  # not a slice: numba would compile what it says if lengths differed, for seconds
            ordered[g * count + r] = lanes[g * samples + r]
    ordered.sort()
    return ordered
