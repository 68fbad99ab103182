"""Rows of a strip list the same pages, on CPUs: a page is unpacked once and scored for one row after the other.

Logits are those of ``_numba_score.score_pages`` to the bit, so that what a row attends to does not depend on whether
its neighbours came along.
"""

from __future__ import annotations

from numba import literally

from ._numba_amx import tiles_off, tiles_on
from ._numba_block import KEY_CODES, KEY_DIM, KV_HEADS, TILES, TOKENS, logits_of, page_of, row_pages
from ._numba_lanes import key_page_logits, unpack_key_page
from ._numba_numbers import RAW_BF16, RAW_F32, fast, inlined
from ._numba_score import bias_of, bytes_of_channel, fold_page, fold_query, score_pages
from ._numba_score_amx import score_on_tiles, unpack_on_tiles, wide_of

AT_ONCE = 16  # rows for which a page is unpacked once


@inlined
def query_size(block, q_per_kv):
    """Float32 numbers that a row's queries, folded ones and biases take."""
    return q_per_kv * (2 * wide_of(block[KEY_DIM]) + 1)


@fast
def score_shared_pages(
    dtype, key_kind, page_size, q_per_kv, block, kv_head, first_row, last_row, first, last, queries, codes, tiles
):
    """Write the logits of pages ``first .. last`` of the rows that have them.

    Args:
        queries: float32 ``[AT_ONCE, query_size]``, codes: ``[key_dim * page_size]``, both for use here.
        tiles: scratch of the matrix tiles, or None where there are none.
    """
    literally(dtype)
    literally(key_kind)
    literally(page_size)
    literally(q_per_kv)
    kv_heads, key_dim = block[KV_HEADS], block[KEY_DIM]
    width = key_dim if tiles is None else wide_of(key_dim)
    end, longest = first, first_row * kv_heads + kv_head
    for row in range(first_row, last_row):
        head = row * kv_heads + kv_head
        fold_query(dtype, q_per_kv, block, head, queries[row - first_row], width)
        pages = min(last, row_pages(block, head))
        if pages > end:
            end, longest = pages, head
    channel_bytes = bytes_of_channel(key_kind, page_size)
    if tiles is not None:
        tiles_on(block[TILES])
    for index in range(first, end):
        page = page_of(block, longest, index, page_size)
        after = page_of(block, longest, min(index + 1, end - 1), page_size)
        if tiles is not None:
            unpack_on_tiles(key_kind, page_size, q_per_kv, block, page, after, tiles)
        elif key_kind < RAW_BF16:
            packed = block[KEY_CODES] + page * key_dim * channel_bytes
            unpack_key_page(key_kind, page_size, packed, channel_bytes, key_dim, codes.ctypes.data)
        for row in range(first_row, last_row):
            head, scratch = row * kv_heads + kv_head, queries[row - first_row]
            if index >= row_pages(block, head):
                continue
            out = logits_of(block, head, q_per_kv).ctypes.data + 4 * index * page_size
            if tiles is not None:
                score_on_tiles(key_kind, page_size, q_per_kv, block, scratch.ctypes.data, tiles, out)
            elif key_kind >= RAW_BF16:
                score_pages(key_kind, page_size, q_per_kv, block, head, index, index + 1, scratch, tiles)
            else:
                folded = fold_page(key_kind, q_per_kv, block, page, scratch)
                key_page_logits(
                    RAW_F32, page_size, q_per_kv, codes.ctypes.data, 4 * page_size, key_dim, folded.ctypes.data,
                    bias_of(scratch, q_per_kv, key_dim).ctypes.data, out, block[TOKENS], codes.ctypes.data,
                )  # fmt: skip
    if tiles is not None:
        tiles_off()
