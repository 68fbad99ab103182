"""Sinks and window that lie in pages of their own, on CPUs: what ``_numba_decode`` does first for each head.

A row lists its pages in order: the ones that hold its sinks, then those of its window. Only the first ``num_sinks``
tokens of the former count, so the logits of a row have a gap between both.
"""

from __future__ import annotations

import numpy as np
from numba import carray, literally

from ._numba_attend import BLOCK_TOKENS, attend_rows
from ._numba_block import (
    CAPACITY,
    KEY_DIM,
    KV_HEADS,
    NUM_SINKS,
    PLAIN_COLUMNS,
    PLAIN_KEYS,
    PLAIN_LEN,
    PLAIN_LOGITS,
    PLAIN_TABLE,
    PLAIN_VALUES,
    ROWS,
    partial_of,
)
from ._numba_lanes import key_page_logits
from ._numba_numbers import f32_at, fast, i32_at, item_bytes
from ._numba_prune import largest
from ._numba_score import bias_of


@fast
def attend_window(dtype, page_size, q_per_kv, value_dim, block, head, scratch, rows):
    """Attend a head to its sinks and window, into partial 0."""
    literally(dtype)
    literally(page_size)
    literally(q_per_kv)
    literally(value_dim)
    item, key_dim, columns, kv_heads = item_bytes(dtype), block[KEY_DIM], block[PLAIN_COLUMNS], block[KV_HEADS]
    row = head // kv_heads
    length = np.int64(carray(i32_at(block[PLAIN_LEN]), (block[ROWS],))[row])
    slots = carray(i32_at(block[PLAIN_TABLE] + 4 * row * columns), (columns,))
    sinks = min(length, block[NUM_SINKS])
    start = (block[NUM_SINKS] + page_size - 1) // page_size * page_size  # column of the window's first token
    end = sinks if length == sinks else start + length - sinks
    bias = bias_of(scratch, q_per_kv, key_dim)
    bias[:] = 0
    stride = page_size * item
    logits = block[PLAIN_LOGITS] + 4 * head * q_per_kv * block[CAPACITY]
    pages = (end + page_size - 1) // page_size
    for column in range(pages):
        keys = block[PLAIN_KEYS] + (np.int64(slots[column]) * kv_heads + head % kv_heads) * key_dim * stride
        ahead = np.int64(slots[min(column + 1, pages - 1)])
        key_page_logits(
            dtype, page_size, q_per_kv, keys, stride, key_dim, scratch.ctypes.data, bias.ctypes.data,
            logits + 4 * column * page_size, block[CAPACITY],
            block[PLAIN_KEYS] + (ahead * kv_heads + head % kv_heads) * key_dim * stride,
        )  # fmt: skip
    partial = partial_of(block, head, 0, q_per_kv, value_dim)
    partial[:, :] = 0
    table = carray(f32_at(logits), (q_per_kv, block[CAPACITY]))
    for g in range(q_per_kv):
        top = largest(table[g], 0, sinks)
        if end > start:
            top = max(top, largest(table[g], start, end))
        partial[g, value_dim] = top
    first = np.int64(0)
    while first < end:
        stop = min(first + BLOCK_TOKENS, sinks if first < sinks else end)
        for i in range(stop - first):
            page = np.int64(slots[(first + i) // page_size]) * kv_heads + head % kv_heads
            rows[i] = page * page_size + (first + i) % page_size
        attend_rows(
            dtype, q_per_kv, value_dim, value_dim, block[PLAIN_VALUES], 0, 0, rows, stop - first,
            logits + 4 * first, block[CAPACITY], 0, partial, scratch, key_dim,
        )  # fmt: skip
        first = start if stop == sinks else stop
