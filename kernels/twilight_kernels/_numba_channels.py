"""Logits from a few channels on CPUs (definition: ``_reference.channel_logits``).

A task is a chunk of pages of one head: it reads their bounds, chooses the channels in which its keys differ most
for its queries, and copies those channels of a page side by side for the tile that scores whole pages.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray, literally
from torch import Tensor

from ._numba_block import (
    CHUNK_PAGES,
    CHUNKS,
    KEY_CODES,
    KEY_DIM,
    KEY_KIND,
    KEY_LO,
    KEY_STEP,
    KV_HEADS,
    LOGITS,
    NUM_CHANNELS,
    PAGE_SIZE,
    ROWS,
    TOKENS,
    kind_of,
    last_contiguous,
    logits_of,
    new_block,
    page_of,
    put_scoring,
    row_pages,
)
from ._numba_lanes import key_page_logits
from ._numba_numbers import (
    RAW_BF16,
    RAW_KIND,
    address_of,
    fast,
    fetch_add,
    half_to_float,
    item_bytes,
    u16_at,
)
from ._numba_pool import BLOCK_SIZE, SOURCE_HASH, compile_worker, run
from ._numba_score import fold_query, mark_absent, read_bounds
from ._reference_score import CHANNEL_CHUNK
from .layout import KeyPages


def channel_logits(
    query: Tensor, pages: KeyPages, num_channels: int, block_table: Tensor, num_pages: Tensor, scaling: float
) -> Tensor:
    """See ``_reference.channel_logits``."""
    (rows, heads, _), kv_heads, page_size = query.shape, pages.codes.shape[1], pages.codec.page_size
    query, table, num_pages = last_contiguous(query), block_table.contiguous(), num_pages.contiguous()
    out = torch.empty(rows, heads, table.shape[1] * page_size, dtype=torch.float32)
    mark_absent(out, num_pages, page_size)
    block = new_block()
    put_scoring(block, query, pages, table, num_pages, scaling)
    block[LOGITS], block[TOKENS] = out.data_ptr(), out.shape[2]
    block[CHUNK_PAGES] = CHANNEL_CHUNK // page_size
    block[CHUNKS] = -(-table.shape[1] // block[CHUNK_PAGES])
    block[KEY_KIND], block[PAGE_SIZE], block[NUM_CHANNELS] = kind_of(pages), page_size, num_channels
    worker = _channels_worker(RAW_KIND[query.dtype], kind_of(pages), page_size, heads // kv_heads)
    run(worker, block.ctypes.data, rows * kv_heads * int(block[CHUNKS]))
    return out


@cache
def _channels_worker(dtype: int, key_kind: int, page_size: int, q_per_kv: int) -> int:
    source = SOURCE_HASH

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, chunks, key_dim = address_of(arg), block[CHUNKS], block[KEY_DIM]
        tasks = block[ROWS] * block[KV_HEADS] * chunks * (source >= 0)
        queries = np.empty(q_per_kv * key_dim, np.float32)
        bounds = np.empty((2, key_dim), np.float32)
        tokens = np.empty(page_size + 3, np.float32)
        weights, chosen = np.empty(key_dim, np.float32), np.empty(block[NUM_CHANNELS], np.int64)
        folded, bias = np.empty((3, q_per_kv, key_dim), np.float32), np.empty(q_per_kv, np.float32)
        few = np.empty(q_per_kv * block[NUM_CHANNELS], np.float32)
        side = np.empty(block[NUM_CHANNELS] * page_size * 2, np.uint16)
        while True:
            task = fetch_add(ticket, 1)
            if task >= tasks:
                break
            head, chunk = task // chunks, task % chunks
            first = chunk * block[CHUNK_PAGES]
            last = min(first + block[CHUNK_PAGES], row_pages(block, head))
            if first >= last:
                continue
            fold_query(dtype, q_per_kv, block, head, queries, block[KEY_DIM])
            _choose(key_kind, page_size, block, head, first, last, queries, q_per_kv, bounds, tokens, weights, chosen)
            for index in range(first, last):
                page = page_of(block, head, index, page_size)
                if key_kind >= RAW_BF16:
                    read_bounds(block, page, bounds, tokens)
                _fold(key_kind, q_per_kv, block, page, queries, bounds, folded)
                _score(key_kind, page_size, q_per_kv, block, head, index, page, chosen, folded, few, bias, side)

    return compile_worker(worker, f"channel_logits, kind {key_kind}, page {page_size}, q_per_kv {q_per_kv}")


@fast
def _choose(key_kind, page_size, block, head, first, last, queries, q_per_kv, bounds, tokens, weights, chosen):
    """Write the channels of the largest ``max |q| * range``, the range summed over pages, ascending by weight."""
    literally(key_kind)
    literally(page_size)
    key_dim = weights.size
    weights[:] = 0
    for index in range(first, last):
        page = page_of(block, head, index, page_size)
        if key_kind >= RAW_BF16:
            read_bounds(block, page, bounds, tokens)
            for d in range(key_dim):
                weights[d] += bounds[1, d]
        else:
            step = carray(u16_at(block[KEY_STEP] + 2 * page * key_dim), (key_dim,))
            for d in range(key_dim):
                weights[d] += half_to_float(step[d])
    for d in range(key_dim):
        largest = np.float32(0)
        for g in range(q_per_kv):
            largest = max(largest, abs(queries[g * key_dim + d]))
        weights[d] *= largest
    for i in range(chosen.size):
        best = np.argmax(weights)
        chosen[i] = best
        weights[best] = np.float32(-1)


@fast
def _fold(key_kind, q_per_kv, block, page, queries, bounds, folded):
    """Write, for each head and channel, what multiplies a code, the least logit, and half its range."""
    literally(key_kind)
    literally(q_per_kv)
    key_dim, half = block[KEY_DIM], np.float32(0.5)
    if key_kind >= RAW_BF16:
        for g in range(q_per_kv):
            for d in range(key_dim):
                weight = queries[g * key_dim + d]
                folded[0, g, d] = weight
                folded[1, g, d] = np.float32(0)
                folded[2, g, d] = weight * (bounds[0, d] + half * bounds[1, d])
    else:
        levels = np.float32((1 << key_kind) - 1)
        lo = carray(u16_at(block[KEY_LO] + 2 * page * key_dim), (key_dim,))
        step = carray(u16_at(block[KEY_STEP] + 2 * page * key_dim), (key_dim,))
        for g in range(q_per_kv):
            for d in range(key_dim):
                weight = queries[g * key_dim + d]
                folded[0, g, d] = weight * half_to_float(step[d])
                folded[1, g, d] = weight * half_to_float(lo[d])
                folded[2, g, d] = half * levels * folded[0, g, d]


@fast
def _score(key_kind, page_size, q_per_kv, block, head, index, page, chosen, folded, few, bias, side):
    """Write the logits of one page: the chosen channels exactly, the others at the middle of their range."""
    literally(key_kind)
    literally(page_size)
    literally(q_per_kv)
    key_dim, count = block[KEY_DIM], chosen.size
    for g in range(q_per_kv):
        middle = np.float32(0)
        for d in range(key_dim):
            middle += folded[1, g, d] + folded[2, g, d]
        for i in range(count):
            few[g * count + i] = folded[0, g, chosen[i]]
            middle -= folded[2, g, chosen[i]]
        bias[g] = middle
    words = page_size * item_bytes(key_kind) // 2 if key_kind >= RAW_BF16 else page_size * key_kind // 16
    codes = block[KEY_CODES] + 2 * page * key_dim * words
    for i in range(count):
        source = carray(u16_at(codes + 2 * chosen[i] * words), (words,))
        target = side[i * words : (i + 1) * words]
        for j in range(words):
            target[j] = source[j]
    out = logits_of(block, head, q_per_kv).ctypes.data + 4 * index * page_size
    key_page_logits(
        key_kind, page_size, q_per_kv, side.ctypes.data, 2 * words, count, few.ctypes.data, bias.ctypes.data,
        out, block[TOKENS], side.ctypes.data,
    )  # fmt: skip
