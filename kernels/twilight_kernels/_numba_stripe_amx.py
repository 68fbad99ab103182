"""The prefill workers' strips on matrix tiles (see ``_numba_amx``, ``_numba_stripe_attend``).

Tiles multiply bfloat16. A wider number ``x`` is the sum of ``high = bfloat16(x)``, ``low = bfloat16(x - high)`` and at
most ``2 ** -17 |x|``; of the four products of two such sums the smallest is left out.

Source: split products, Henry, Tang and Heinecke (arXiv 1904.06376), section 2.
"""

from __future__ import annotations

import numpy as np
from numba import carray, literally

from ._numba_amx import tile_product, tiles_off, tiles_on
from ._numba_numbers import LOWEST, RAW_BF16, fast, i32_at, item_bytes, read_row, u16_at, write_row
from ._numba_stripe_attend import clear_padding, list_keys, write_strip
from ._numba_stripe_block import (
    DIM,
    KEYS,
    KEYS_LOW,
    QUERY,
    ROWS,
    SCALING,
    STRIPS,
    TILES,
    TOTAL,
    VALUE_DIM,
    VALUES,
    VALUES_LOW,
    float_field,
    strip_of,
)
from ._numba_stripe_select import choose_stripes, running, sampled_rows, weigh_tile
from ._numba_strips import BLOCK, hide_later, shrink_rows, softmax_tile

_TILE = 64  # keys at a time, of sampled rows
_STEP = 32  # numbers that one tile instruction sums over; shorter sums are filled up with zeros


@fast
def attend_strip_tiles(kind, parts, q_per_kv, block, task):
    """Attend the query rows of a task to their sinks, window and stripes; numbers in 1 or 2 ``parts``."""
    literally(kind)
    literally(parts)
    literally(q_per_kv)
    row, kv_head, pad, start, end = strip_of(block, task)
    if task % block[STRIPS] == 0:
        clear_padding(kind, q_per_kv, block, row, kv_head, start)
    if start >= end:
        return
    dim, value_dim, offset = block[DIM], block[VALUE_DIM], block[TOTAL] - block[ROWS]
    wide, value_wide = (dim + _STEP - 1) // _STEP * _STEP, (value_dim + _STEP - 1) // _STEP * _STEP
    per_head = (end - start + BLOCK - 1) // BLOCK
    blocks, tile = q_per_kv * per_head, 2 * _TILE // parts  # keys at a time: longer sums, while all is near the core
    query = np.zeros((blocks, parts, wide // 2, BLOCK), np.int32)
    out = np.zeros((blocks, value_wide, BLOCK), np.float32)
    top, total = np.full((blocks, BLOCK), LOWEST, np.float32), np.zeros((blocks, BLOCK), np.float32)
    for i in range(blocks):
        first, head = start + i % per_head * BLOCK, kv_head * q_per_kv + i // per_head
        for r in range(min(BLOCK, end - first)):
            _pack_query(kind, parts, block, row, head, first + r, dim, r, query[i])
    listed = np.empty(end + offset - pad, np.int32)
    count = list_keys(block, task, pad, start + offset, end + offset, listed)
    keys, values = np.zeros((parts, tile, wide), np.uint16), np.zeros((parts, value_wide, tile), np.uint16)
    logits, weights = np.empty((tile, BLOCK), np.float32), np.empty((parts, tile // 2, BLOCK), np.int32)
    shrink = np.empty(BLOCK, np.float32)
    key_base = block[KEYS] + 2 * (row * block[KEYS + 1] + kv_head * block[KEYS + 2])
    value_base = block[VALUES] + 2 * (row * block[VALUES + 1] + kv_head * block[VALUES + 2])
    scaling = np.float32(float_field(block, SCALING))
    tiles_on(block[TILES])
    for first in range(0, count, tile):
        here = min(tile, count - first)
        positions = listed[first:].ctypes.data
        for low in range(parts):
            key_place, value_place = key_base + low * block[KEYS_LOW], value_base + low * block[VALUES_LOW]
            _gather_keys(key_place, 2 * block[KEYS + 3], positions, here, dim, keys[low])
            _gather_values(value_place, 2 * block[VALUES + 3], positions, here, value_dim, values[low])
        for i in range(blocks):
            position = start + offset + i % per_head * BLOCK
            if listed[first] >= position + BLOCK:
                continue  # wholly behind these rows
            tile_product(
                parts, 0, keys.ctypes.data, 2 * wide, tile, wide // 2, query[i].ctypes.data, logits.ctypes.data
            )
            if listed[first + here - 1] > position:
                hide_later(logits, positions, here, position)
            logits[here:] = LOWEST
            if softmax_tile(
                parts, BLOCK, logits.ctypes.data, weights.ctypes.data, tile, scaling, top[i].ctypes.data,
                total[i].ctypes.data, shrink.ctypes.data,
            ):  # fmt: skip
                shrink_rows(out[i], value_dim, shrink)
            tile_product(
                parts, 1, values.ctypes.data, 2 * tile, value_wide, tile // 2, weights.ctypes.data,
                out[i].ctypes.data,
            )  # fmt: skip
    tiles_off()
    write_strip(kind, block, row, kv_head, q_per_kv, start, end, out, total)


@fast
def select_strip_tiles(q_per_kv, samples, lanes, block, task, weights):
    """As ``select_strip``."""
    literally(q_per_kv)
    literally(samples)
    literally(lanes)
    row, kv_head, pad, start, end = strip_of(block, task)
    if start >= end:
        return
    rows, keys = np.empty(samples, np.int64), end + block[TOTAL] - block[ROWS] - pad
    count = sampled_rows(samples, block, start, end, pad, rows)
    dim = block[DIM]
    wide = (dim + _STEP - 1) // _STEP * _STEP
    query = np.zeros(((q_per_kv * samples + BLOCK - 1) // BLOCK, 1, wide // 2, BLOCK), np.int32)
    for g in range(q_per_kv):
        for r in range(count):
            lane = g * samples + r
            head, packed = kv_head * q_per_kv + g, query[lane // BLOCK]
            _pack_query(RAW_BF16, 1, block, row, head, rows[r], dim, lane % BLOCK, packed)
    tile, logits = np.zeros((_TILE, wide), np.uint16), np.empty((_TILE, BLOCK), np.float32)
    state = running(weights)
    base = block[KEYS] + 2 * (row * block[KEYS + 1] + kv_head * block[KEYS + 2] + pad * block[KEYS + 3])
    tiles_on(block[TILES])
    for first in range(0, keys, _TILE):
        here = min(_TILE, keys - first)
        for n in range(here):
            source = carray(u16_at(base + 2 * (first + n) * block[KEYS + 3]), (dim,))
            for d in range(dim):
                tile[n, d] = source[d]
        for i in range(len(query)):
            tile_product(1, 0, tile.ctypes.data, 2 * wide, _TILE, wide // 2, query[i].ctypes.data, logits.ctypes.data)
            weigh_tile(samples, lanes, block, pad, i, rows, count, first, here, logits, weights[i], state[i])
    tiles_off()
    choose_stripes(q_per_kv, samples, lanes, block, task, count, weights, keys, state)


@fast
def _pack_query(kind, parts, block, row, head, position, dim, lane, out):
    """Write one query row as a lane of ``out [parts, dim / 2, 64]``, two numbers in one."""
    literally(kind)
    literally(parts)
    at = row * block[QUERY + 1] + head * block[QUERY + 2] + position * block[QUERY + 3]
    address = block[QUERY] + item_bytes(kind) * at
    if parts == 1:
        pairs = carray(i32_at(address), (dim // 2,))  # neighbours stay neighbours
        for d in range(dim // 2):
            out[0, d, lane] = pairs[d]
        return
    numbers, high, halves = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(dim, np.uint16)
    pairs = carray(i32_at(halves.ctypes.data), (dim // 2,))
    read_row(kind, address, dim, numbers)
    for low in range(2):
        write_row(RAW_BF16, halves.ctypes.data, dim, numbers)
        read_row(RAW_BF16, halves.ctypes.data, dim, high)
        for d in range(dim // 2):
            out[low, d, lane] = pairs[d]
        for d in range(dim):
            numbers[d] -= high[d]


@fast
def _gather_keys(base, row_bytes, positions, count, dim, out):
    listed = carray(i32_at(positions), (count,))
    for n in range(count):
        source = carray(u16_at(base + row_bytes * listed[n]), (dim,))
        for d in range(dim):
            out[n, d] = source[d]


@fast
def _gather_values(base, row_bytes, positions, count, dim, out):
    """Gather value rows channel-major; what is beyond ``count`` stays finite, and its weights are zero."""
    listed = carray(i32_at(positions), (count,))
    for n in range(count):
        source = carray(u16_at(base + row_bytes * listed[n]), (dim,))
        for d in range(dim):
            out[d, n] = source[d]
