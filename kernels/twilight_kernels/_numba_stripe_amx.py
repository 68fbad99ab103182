"""The prefill workers' strips on matrix tiles, for bfloat16 (see ``_numba_amx``, ``_numba_stripe_attend``)."""

from __future__ import annotations

import numpy as np
from numba import carray, literally

from ._numba_amx import tile_product, tiles_off, tiles_on
from ._numba_numbers import LOWEST, RAW_BF16, fast, i32_at, u16_at
from ._numba_stripe_attend import list_keys, write_strip
from ._numba_stripe_block import (
    DIM,
    KEYS,
    QUERY,
    ROWS,
    SCALING,
    TILES,
    TOTAL,
    VALUE_DIM,
    VALUES,
    float_field,
    strip_of,
)
from ._numba_stripe_select import choose_stripes, running, sampled_rows, weigh_tile
from ._numba_strips import BLOCK, hide_later, shrink_rows, softmax_tile

_TILE = 64  # keys at a time
_STEP = 32  # numbers that one tile instruction sums over; shorter sums are filled up with zeros


@fast
def attend_strip_tiles(q_per_kv, block, task):
    """Attend the query rows of a task to their sinks, window and stripes."""
    literally(q_per_kv)
    row, kv_head, pad, start, end = strip_of(block, task)
    if start >= end:
        return
    dim, value_dim, offset = block[DIM], block[VALUE_DIM], block[TOTAL] - block[ROWS]
    wide, value_wide = (dim + _STEP - 1) // _STEP * _STEP, (value_dim + _STEP - 1) // _STEP * _STEP
    per_head = (end - start + BLOCK - 1) // BLOCK
    blocks = q_per_kv * per_head
    query = np.zeros((blocks, wide // 2, BLOCK), np.int32)
    out = np.zeros((blocks, value_wide, BLOCK), np.float32)
    top, total = np.full((blocks, BLOCK), LOWEST, np.float32), np.zeros((blocks, BLOCK), np.float32)
    for i in range(blocks):
        first, head = start + i % per_head * BLOCK, kv_head * q_per_kv + i // per_head
        for r in range(min(BLOCK, end - first)):
            _pack_query(block, row, head, first + r, dim, r, query[i])
    listed = np.empty(end + offset - pad, np.int32)
    count = list_keys(block, task, pad, start + offset, end + offset, listed)
    keys, values = np.zeros((_TILE, wide), np.uint16), np.zeros((value_wide, _TILE), np.uint16)
    logits, shrink = np.empty((_TILE, BLOCK), np.float32), np.empty(BLOCK, np.float32)
    key_base = block[KEYS] + 2 * (row * block[KEYS + 1] + kv_head * block[KEYS + 2])
    value_base = block[VALUES] + 2 * (row * block[VALUES + 1] + kv_head * block[VALUES + 2])
    scaling = np.float32(float_field(block, SCALING))
    tiles_on(block[TILES])
    for first in range(0, count, _TILE):
        here = min(_TILE, count - first)
        positions = listed[first:].ctypes.data
        _gather_keys(key_base, 2 * block[KEYS + 3], positions, here, dim, keys)
        _gather_values(value_base, 2 * block[VALUES + 3], positions, here, value_dim, values)
        for i in range(blocks):
            position = start + offset + i % per_head * BLOCK
            if listed[first] >= position + BLOCK:
                continue  # wholly behind these rows
            tile_product(0, keys.ctypes.data, 2 * wide, _TILE, wide // 2, query[i].ctypes.data, logits.ctypes.data)
            if listed[first + here - 1] > position:
                hide_later(logits, positions, here, position)
            logits[here:] = LOWEST
            if softmax_tile(
                1, BLOCK, logits.ctypes.data, logits.ctypes.data, _TILE, scaling, top[i].ctypes.data,
                total[i].ctypes.data, shrink.ctypes.data,
            ):  # fmt: skip
                shrink_rows(out[i], value_dim, shrink)
            tile_product(
                1, values.ctypes.data, 2 * _TILE, value_wide, _TILE // 2, logits.ctypes.data, out[i].ctypes.data
            )
    tiles_off()
    write_strip(RAW_BF16, block, row, kv_head, q_per_kv, start, end, out, total)


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
    query = np.zeros(((q_per_kv * samples + BLOCK - 1) // BLOCK, wide // 2, BLOCK), np.int32)
    for g in range(q_per_kv):
        for r in range(count):
            lane = g * samples + r
            _pack_query(block, row, kv_head * q_per_kv + g, rows[r], dim, lane % BLOCK, query[lane // BLOCK])
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
            tile_product(0, tile.ctypes.data, 2 * wide, _TILE, wide // 2, query[i].ctypes.data, logits.ctypes.data)
            weigh_tile(samples, lanes, block, pad, i, rows, count, first, here, logits, weights[i], state[i])
    tiles_off()
    choose_stripes(q_per_kv, samples, lanes, block, task, count, weights, keys, state)


@fast
def _pack_query(block, row, head, position, dim, lane, out):
    """Write one query row as a lane of ``out [dim / 2, 64]``, two numbers in one."""
    address = block[QUERY] + 2 * (row * block[QUERY + 1] + head * block[QUERY + 2] + position * block[QUERY + 3])
    pairs = carray(i32_at(address), (dim // 2,))  # neighbours stay neighbours
    for d in range(dim // 2):
        out[d, lane] = pairs[d]


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
