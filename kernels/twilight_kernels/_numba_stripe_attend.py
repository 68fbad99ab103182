"""Attention of one strip to a list of keys, with one online softmax (definition: ``_reference_prefill``)."""

from __future__ import annotations

import numpy as np
from numba import carray, literally

from ._numba_ir import LANES
from ._numba_numbers import LOWEST, f32_at, fast, item_bytes, u8_at, write_row
from ._numba_stripe_block import (
    DIM,
    KEYS,
    MASK,
    OUT,
    QUERY,
    ROWS,
    SCALING,
    SINKS,
    STRIPS,
    TOTAL,
    VALUE_DIM,
    VALUES,
    float_field,
    slab_start,
    strip_of,
)
from ._numba_strips import (
    BLOCK,
    TILE,
    gather_rows,
    hide_later,
    outer_product,
    pack_block,
    shrink_rows,
    softmax_tile,
)
from ._numba_transpose import transpose


@fast
def attend_strip(kind, q_per_kv, block, task):
    """Attend the query rows of a task to their sinks, window and stripes."""
    literally(kind)
    literally(q_per_kv)
    row, kv_head, pad, start, end = strip_of(block, task)
    if task % block[STRIPS] == 0:
        clear_padding(kind, q_per_kv, block, row, kv_head, start)
    if start >= end:
        return
    item, dim, value_dim = item_bytes(kind), block[DIM], block[VALUE_DIM]
    offset = block[TOTAL] - block[ROWS]
    per_head = (end - start + BLOCK - 1) // BLOCK
    blocks = q_per_kv * per_head
    query = np.empty((blocks, dim, BLOCK), np.float32)
    out = np.zeros((blocks, value_dim, BLOCK), np.float32)
    top = np.full((blocks, BLOCK), LOWEST, np.float32)
    total = np.zeros((blocks, BLOCK), np.float32)
    for i in range(blocks):
        first = start + i % per_head * BLOCK
        head = kv_head * q_per_kv + i // per_head
        address = block[QUERY] + item * (row * block[QUERY + 1] + head * block[QUERY + 2] + first * block[QUERY + 3])
        count = min(BLOCK, end - first)
        pack_block(kind, address, block[QUERY + 3], count, dim, query[i])
    listed = np.empty(end + offset - pad, np.int32)
    count = list_keys(block, task, pad, start + offset, end + offset, listed)
    scaling = np.float32(float_field(block, SCALING))
    keys, values = np.empty((TILE, dim), np.float32), np.empty((TILE, value_dim), np.float32)
    logits, shrink = np.empty((TILE, BLOCK), np.float32), np.empty(BLOCK, np.float32)
    key_base = block[KEYS] + item * (row * block[KEYS + 1] + kv_head * block[KEYS + 2])
    value_base = block[VALUES] + item * (row * block[VALUES + 1] + kv_head * block[VALUES + 2])
    for first in range(0, count, TILE):
        here = min(TILE, count - first)
        positions = listed[first:].ctypes.data
        gather_rows(kind, key_base, item * block[KEYS + 3], positions, here, dim, keys)
        gather_rows(kind, value_base, item * block[VALUES + 3], positions, here, value_dim, values)
        for i in range(blocks):
            position = start + offset + i % per_head * BLOCK
            if listed[first] >= position + BLOCK:
                continue  # wholly behind these rows
            outer_product(BLOCK, 0, keys.ctypes.data, dim, 1, here, dim, query[i].ctypes.data, logits.ctypes.data)
            if listed[first + here - 1] > position:
                hide_later(logits.ctypes.data, positions, here, position)
            if softmax_tile(
                0, BLOCK, logits.ctypes.data, logits.ctypes.data, here, scaling, top[i].ctypes.data,
                total[i].ctypes.data, shrink.ctypes.data,
            ):  # fmt: skip
                shrink_rows(out[i].ctypes.data, value_dim, shrink.ctypes.data)
            outer_product(
                BLOCK, 1, values.ctypes.data, 1, value_dim, value_dim, here, logits.ctypes.data, out[i].ctypes.data
            )
    write_strip(kind, block, row, kv_head, q_per_kv, start, end, out.ctypes.data, value_dim, total.ctypes.data)


@fast
def clear_padding(kind, q_per_kv, block, row, kv_head, start):
    """Zero the rows of padding in front of the first strip, which begins at ``start``."""
    literally(kind)
    nothing = np.zeros(block[VALUE_DIM], np.float32)
    for head in range(kv_head * q_per_kv, (kv_head + 1) * q_per_kv):
        for r in range(start):
            place = row * block[OUT + 1] + head * block[OUT + 2] + r * block[OUT + 3]
            write_row(kind, block[OUT] + item_bytes(kind) * place, block[VALUE_DIM], nothing)


@fast
def write_strip(kind, block, row, kv_head, q_per_kv, start, end, out, out_dim, total):
    """Write ``out [blocks, out_dim, 64]`` over ``total [blocks, 64]`` (addresses) to the rows of a strip."""
    literally(kind)
    item, per_head, dim = item_bytes(kind), (end - start + BLOCK - 1) // BLOCK, block[VALUE_DIM]
    width = (dim + LANES - 1) // LANES * LANES
    rows = np.empty((BLOCK, width), np.float32)
    place = rows.ctypes.data
    for i in range(q_per_kv * per_head):
        first, head = start + i % per_head * BLOCK, kv_head * q_per_kv + i // per_head
        address = block[OUT] + item * (row * block[OUT + 1] + head * block[OUT + 2] + first * block[OUT + 3])
        totals = carray(f32_at(total + 4 * BLOCK * i), (BLOCK,))
        transpose(out + 4 * BLOCK * out_dim * i, 4 * BLOCK, dim, BLOCK, place, 4 * width)
        for r in range(min(BLOCK, end - first)):
            numbers, inverse = carray(f32_at(place + 4 * width * r), (dim,)), np.float32(1) / totals[r]
            for d in range(dim):
                numbers[d] *= inverse
            write_row(kind, address + item * r * block[OUT + 3], dim, numbers)
    rows[0, 0] = 0  # it must live until here


@fast
def list_keys(block, task, pad, position, end, out):
    """Write the keys of a strip at ``position .. end``, ascending: sinks, stripes, window; return how many."""
    mask = carray(u8_at(block[MASK] + task * ((block[TOTAL] + 7) // 8)), ((block[TOTAL] + 7) // 8,))
    slab = slab_start(block, pad, position)
    sinks = min(pad + block[SINKS], slab)
    count = 0
    for key in range(pad, sinks):
        out[count] = key
        count += 1
    for key in range(sinks, slab):
        if (mask[key >> 3] >> (key & 7)) & 1:
            out[count] = key
            count += 1
    for key in range(slab, end):
        out[count] = key
        count += 1
    return count
