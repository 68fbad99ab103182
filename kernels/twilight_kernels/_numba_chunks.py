"""The tasks of a decode step: the plain tokens of one head, and a chunk of its pages."""

from __future__ import annotations

import numpy as np
from numba import carray, literally

from ._numba_attend import BLOCK_TOKENS, attend_rows
from ._numba_block import (
    CANDIDATE_TOKENS,
    CAPACITY,
    CHUNK_PAGES,
    KEY_DIM,
    KV_HEADS,
    NEW_KEY,
    NEW_KEY_HEAD,
    NEW_KEY_ROW,
    NEW_VALUE,
    NEW_VALUE_HEAD,
    NEW_VALUE_ROW,
    NUM_REFINED,
    PLAIN_KEYS,
    PLAIN_LEN,
    PLAIN_LOGITS,
    PLAIN_VALUES,
    ROWS,
    TOKENS,
    VALUE_CODES,
    VALUE_LO,
    VALUE_STEP,
    is_sparse,
    logits_of,
    page_of,
    partial_of,
    scored_pages,
)
from ._numba_ir import LANES
from ._numba_lanes import key_page_logits
from ._numba_numbers import (
    LOWEST,
    f32_at,
    fast,
    i32_at,
    item_bytes,
    read_number,
    write_number,
)
from ._numba_prune import largest
from ._numba_score import bias_of, score_pages
from ._numba_sparse import score_candidates


@fast
def attend_plain(dtype, q_per_kv, value_dim, block, head, scratch, rows):
    """Append the step's token, then attend to sinks and window."""
    literally(dtype)
    literally(q_per_kv)
    literally(value_dim)
    item, key_dim, capacity = item_bytes(dtype), block[KEY_DIM], block[CAPACITY]
    length = np.int64(carray(i32_at(block[PLAIN_LEN]), (block[ROWS],))[head // block[KV_HEADS]])
    if block[NEW_KEY] != 0:
        _append(dtype, value_dim, block, head, length - 1)
    bias = bias_of(scratch, q_per_kv, key_dim)
    bias[:] = 0
    keys = block[PLAIN_KEYS] + head * key_dim * capacity * item
    logits = block[PLAIN_LOGITS] + 4 * head * q_per_kv * capacity
    column = 0
    while column < length:
        if column + 48 < length and column + 64 <= capacity:
            key_page_logits(
                dtype, 64, q_per_kv, keys + column * item, capacity * item, key_dim, scratch.ctypes.data,
                bias.ctypes.data, logits + 4 * column, capacity, keys + column * item,
            )  # fmt: skip
            column += 64
        else:
            key_page_logits(
                dtype, LANES, q_per_kv, keys + column * item, capacity * item, key_dim, scratch.ctypes.data,
                bias.ctypes.data, logits + 4 * column, capacity, keys + column * item,
            )  # fmt: skip
            column += LANES
    partial = partial_of(block, head, 0, q_per_kv, value_dim)
    partial[:, :] = 0
    table = carray(f32_at(logits), (q_per_kv, capacity))
    for g in range(q_per_kv):
        partial[g, value_dim] = largest(table[g], 0, length)
    for first in range(0, length, BLOCK_TOKENS):
        count = min(BLOCK_TOKENS, length - first)
        for i in range(count):
            rows[i] = head * capacity + first + i
        attend_rows(
            dtype, q_per_kv, value_dim, value_dim, block[PLAIN_VALUES], 0, 0, rows, count,
            logits + 4 * first, capacity, 0, partial, scratch, key_dim,
        )  # fmt: skip


@fast
def _append(dtype, value_dim, block, head, column):
    row, kv_head = head // block[KV_HEADS], head % block[KV_HEADS]
    key_dim, capacity = block[KEY_DIM], block[CAPACITY]
    start = row * block[NEW_KEY_ROW] + kv_head * block[NEW_KEY_HEAD]
    given = key_dim - block[NUM_REFINED]
    for d in range(given, key_dim):
        write_number(dtype, block[PLAIN_KEYS], (head * key_dim + d) * capacity + column, np.float32(0))
    for d in range(given):
        number = read_number(dtype, block[NEW_KEY], start + d)
        write_number(dtype, block[PLAIN_KEYS], (head * key_dim + d) * capacity + column, number)
    start = row * block[NEW_VALUE_ROW] + kv_head * block[NEW_VALUE_HEAD]
    for d in range(value_dim):
        number = read_number(dtype, block[NEW_VALUE], start + d)
        write_number(dtype, block[PLAIN_VALUES], (head * capacity + column) * value_dim + d, number)


@fast
def attend_pages(
    key_kind,
    value_kind,
    page_size,
    q_per_kv,
    value_dim,
    group_size,
    block,
    head,
    chunk,
    is_scored,
    scratch,
    rows,
    tiles,
):
    """Score one chunk of pages, if that was not done; attend to it at once if the row is dense."""
    literally(key_kind)
    literally(value_kind)
    literally(page_size)
    literally(q_per_kv)
    literally(value_dim)
    literally(group_size)
    partial = partial_of(block, head, chunk, q_per_kv, value_dim)
    partial[:, :] = 0
    first = (chunk - 1) * block[CHUNK_PAGES]
    last = min(first + block[CHUNK_PAGES], scored_pages(block, head, page_size))
    partial[:, value_dim] = LOWEST
    if first >= last:
        return
    logits = logits_of(block, head, q_per_kv)
    if is_scored:
        pass
    elif block[CANDIDATE_TOKENS] != 0 and is_sparse(block, head, page_size):
        score_candidates(key_kind, page_size, q_per_kv, block, head, first, last, scratch, tiles)
    else:
        score_pages(key_kind, page_size, q_per_kv, block, head, first, last, scratch, tiles)
    for g in range(q_per_kv):
        partial[g, value_dim] = largest(logits[g], first * page_size, last * page_size)
    if is_sparse(block, head, page_size):
        return
    pages_at_once = BLOCK_TOKENS // page_size
    for start in range(first, last, pages_at_once):
        count = min(last - start, pages_at_once)
        for i in range(count):
            page = page_of(block, head, start + i, page_size)
            for t in range(page_size):
                rows[i * page_size + t] = page * page_size + t
        attend_rows(
            value_kind, q_per_kv, value_dim, group_size, block[VALUE_CODES], block[VALUE_LO], block[VALUE_STEP],
            rows, count * page_size, logits.ctypes.data + 4 * start * page_size, block[TOKENS], 0, partial, scratch,
            block[KEY_DIM],
        )  # fmt: skip
