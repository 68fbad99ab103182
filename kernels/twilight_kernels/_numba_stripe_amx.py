"""The prefill workers' strips on matrix tiles (see ``_numba_amx``, ``_numba_stripe_attend``).

Tiles multiply bfloat16. A wider number ``x`` is the sum of ``high = bfloat16(x)``, ``low = bfloat16(x - high)`` and at
most ``2 ** -17 |x|``; of the four products of two such sums the smallest is left out.

Source: split products, Henry, Tang and Heinecke (arXiv 1904.06376), section 2.
"""

from __future__ import annotations

import numpy as np
from numba import carray, literally

from ._numba_amx import tile_product, tiles_off, tiles_on
from ._numba_numbers import (
    LOWEST,
    RAW_BF16,
    aligned,
    f32_at,
    fast,
    i32_at,
    inlined,
    item_bytes,
    read_row,
    u16_at,
    write_row,
)
from ._numba_pair_weights import UNITS, UNREFERENCED, pair_weights
from ._numba_stripe_attend import clear_padding, list_keys, write_strip
from ._numba_stripe_block import (
    DIM,
    KEYS,
    KEYS_LOW,
    QUERY,
    ROWS,
    SCALING,
    STRIP,
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
from ._numba_transpose import transpose

_TILE = 64  # keys at a time, of sampled rows
_STEP = 32  # numbers that one tile instruction sums over; shorter sums are filled up with zeros


@fast
def room_of(parts, q_per_kv, block):
    """Bytes that ``attend_strip_tiles`` works in."""
    wide, value_wide = _widened(block[DIM]), _widened(block[VALUE_DIM])
    blocks, tile = q_per_kv * ((block[STRIP] + BLOCK - 1) // BLOCK), 2 * _TILE // parts
    by_block = 2 * parts * wide * BLOCK + 4 * value_wide * BLOCK + 8 * BLOCK
    by_tile = tile * (2 * parts * (wide + value_wide + BLOCK) + 4 * BLOCK) + 2 * tile * value_wide
    return blocks * by_block + by_tile + 4 * BLOCK + 4 * block[TOTAL]


@fast
def attend_strip_tiles(kind, parts, q_per_kv, block, task, room):
    """Attend the query rows of a task to their sinks, window and stripes; numbers in 1 or 2 ``parts``.

    ``room`` is the address, a multiple of 64, of ``room_of`` bytes: all that follows lies in it, because arrays of
    numba would count references with locked instructions, each of which waits for the tiles.
    """
    literally(kind)
    literally(parts)
    literally(q_per_kv)
    row, kv_head, pad, start, end = strip_of(block, task)
    if task % block[STRIPS] == 0:
        clear_padding(kind, q_per_kv, block, row, kv_head, start)
    if start >= end:
        return
    dim, value_dim, offset = block[DIM], block[VALUE_DIM], block[TOTAL] - block[ROWS]
    wide, value_wide = _widened(dim), _widened(value_dim)
    per_head = (end - start + BLOCK - 1) // BLOCK
    blocks, tile = q_per_kv * per_head, 2 * _TILE // parts  # keys at a time: longer sums, while all is near the core
    query, query_bytes = room, 2 * parts * wide * BLOCK
    out, out_bytes = query + blocks * query_bytes, 4 * value_wide * BLOCK
    top = out + blocks * out_bytes
    total = top + blocks * 4 * BLOCK
    keys = total + blocks * 4 * BLOCK
    values = keys + 2 * parts * tile * wide
    logits = values + 2 * parts * value_wide * tile
    weights = logits + 4 * tile * BLOCK
    shrink = weights + 2 * parts * tile * BLOCK
    pairs = shrink + 4 * BLOCK
    positions = pairs + 2 * tile * value_wide
    _clear(query, (pairs - query) // 4)
    carray(f32_at(top), (blocks * BLOCK,))[:] = UNREFERENCED if parts == 1 else LOWEST
    for i in range(blocks):
        first, head = start + i % per_head * BLOCK, kv_head * q_per_kv + i // per_head
        _pack_query(kind, parts, block, row, head, first, min(BLOCK, end - first), query + i * query_bytes)
    listed = carray(i32_at(positions), (end + offset - pad,))
    count = list_keys(block, task, pad, start + offset, end + offset, listed)
    key_base = block[KEYS] + 2 * (row * block[KEYS + 1] + kv_head * block[KEYS + 2])
    value_base = block[VALUES] + 2 * (row * block[VALUES + 1] + kv_head * block[VALUES + 2])
    scaling = np.float32(float_field(block, SCALING))
    tiles_on(block[TILES])
    for first in range(0, count, tile):
        here = min(tile, count - first)
        place = positions + 4 * first
        for low in range(parts):
            _gather_keys(
                key_base + low * block[KEYS_LOW], 2 * block[KEYS + 3], place, here, dim, keys + low * 2 * tile * wide
            )
            _gather_values(
                value_base + low * block[VALUES_LOW], 2 * block[VALUES + 3], place, here, value_dim, pairs,
                values + low * 2 * tile * value_wide, 2 * tile,
            )  # fmt: skip
        for i in range(blocks):
            position = start + offset + i % per_head * BLOCK
            if listed[first] >= position + BLOCK:
                continue  # wholly behind these rows
            tile_product(parts, 0, keys, 2 * wide, tile, wide // 2, query + i * query_bytes, logits)
            if listed[first + here - 1] > position:
                hide_later(logits, place, here, position)
            for n in range(here * BLOCK, tile * BLOCK):
                carray(f32_at(logits), (tile * BLOCK,))[n] = LOWEST
            of_block = i * 4 * BLOCK
            if parts == 1:
                is_moved = pair_weights(
                    first == 0, logits, tile, scaling * UNITS, top + of_block, total + of_block, shrink, weights
                )
            else:
                is_moved = softmax_tile(
                    2, BLOCK, logits, weights, tile, scaling, top + of_block, total + of_block, shrink
                )
            if is_moved:
                shrink_rows(out + i * out_bytes, value_dim, shrink)
            tile_product(parts, 1, values, 2 * tile, value_wide, tile // 2, weights, out + i * out_bytes)
    tiles_off()
    write_strip(kind, block, row, kv_head, q_per_kv, start, end, out, value_wide, total)


@inlined
def _widened(dim):
    """Numbers of a row, filled up with zeros to whole steps."""
    return (dim + _STEP - 1) // _STEP * _STEP


@fast
def _clear(address, count):
    carray(f32_at(address), (count,))[:] = 0


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
    dim, wide = block[DIM], _widened(block[DIM])
    blocks = (q_per_kv * samples + BLOCK - 1) // BLOCK
    query = aligned(2 * blocks * wide * BLOCK).view(np.int32).reshape(blocks, 1, wide // 2, BLOCK)
    query[:] = 0
    for g in range(q_per_kv):
        for r in range(count):
            lane = g * samples + r
            head, packed = kv_head * q_per_kv + g, query[lane // BLOCK, 0]
            at = row * block[QUERY + 1] + head * block[QUERY + 2] + rows[r] * block[QUERY + 3]
            pairs = carray(i32_at(block[QUERY] + 2 * at), (dim // 2,))  # neighbours stay neighbours
            for d in range(dim // 2):
                packed[d, lane % BLOCK] = pairs[d]
    tile = aligned(2 * _TILE * wide).view(np.uint16).reshape(_TILE, wide)
    logits = aligned(4 * _TILE * BLOCK).view(np.float32).reshape(_TILE, BLOCK)
    tile[:] = 0
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
def _pack_query(kind, parts, block, row, head, first, count, out):
    """Write ``count`` query rows as lanes of ``out [parts, dim / 2, 64]`` (address), two numbers in one.

    Lanes behind the last row repeat it.
    """
    literally(kind)
    literally(parts)
    dim, item = block[DIM], item_bytes(kind)
    wide = _widened(dim)
    address = block[QUERY] + item * (row * block[QUERY + 1] + head * block[QUERY + 2] + first * block[QUERY + 3])
    if parts == 1:
        transpose(address, item * block[QUERY + 3], count, dim // 2, out, 4 * BLOCK)
        return
    numbers, high = np.empty(dim, np.float32), np.empty(dim, np.float32)
    halves = np.zeros((2, BLOCK, wide), np.uint16)
    for lane in range(count):
        read_row(kind, address + item * lane * block[QUERY + 3], dim, numbers)
        for low in range(2):
            write_row(RAW_BF16, halves[low, lane].ctypes.data, dim, numbers)
            read_row(RAW_BF16, halves[low, lane].ctypes.data, dim, high)
            for d in range(dim):
                numbers[d] -= high[d]
    for low in range(2):
        transpose(halves[low].ctypes.data, 2 * wide, count, dim // 2, out + low * 2 * wide * BLOCK, 4 * BLOCK)


@fast
def _gather_keys(base, row_bytes, positions, count, dim, out):
    """Gather key rows to ``out [count, dim filled up]`` (address)."""
    listed = carray(i32_at(positions), (count,))
    wide = _widened(dim)
    for n in range(count):
        source = carray(u16_at(base + row_bytes * listed[n]), (dim,))
        target = carray(u16_at(out + 2 * wide * n), (dim,))
        for d in range(dim):
            target[d] = source[d]


@fast
def _gather_values(base, row_bytes, positions, count, dim, pairs, out, out_bytes):
    """Gather value rows channel-major to ``out``, ``out_bytes`` from channel to channel (addresses).

    ``pairs`` is room for two rows side by side. What is beyond ``count`` stays finite, and its weights are zero.
    """
    listed = carray(i32_at(positions), (count,))
    for n in range((count + 1) // 2):
        even = carray(u16_at(base + row_bytes * listed[2 * n]), (dim,))
        odd = carray(u16_at(base + row_bytes * listed[min(2 * n + 1, count - 1)]), (dim,))
        both = carray(i32_at(pairs + 4 * dim * n), (dim,))
        for d in range(dim):
            both[d] = np.int32(even[d]) | (np.int32(odd[d]) << np.int32(16))
    transpose(pairs, 4 * dim, (count + 1) // 2, dim, out, out_bytes)
