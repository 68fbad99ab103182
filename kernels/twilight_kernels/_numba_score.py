"""Scoring packed keys on CPUs: logits of whole pages, and Quest's bound of a page.

Definitions: ``_reference.key_logits``, ``_reference.page_scores``. A page's scales are folded into the query,
``q . (lo + code * step) = sum((q * step) * code) + q . lo``, so the codes are never dequantized.

The scratch of a thread starts, here and in ``_numba_attend``, with float32 ``query [q_per_kv, key_dim] |
folded query [q_per_kv, key_dim] | bias [q_per_kv]``.
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
    NUM_REFINED,
    PAGE_SIZE,
    Q_PER_KV,
    QUERY,
    QUERY_HEAD,
    QUERY_KIND,
    QUERY_ROW,
    REFINED,
    ROWS,
    SCALING,
    TOKENS,
    float_field,
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
    exact,
    fast,
    fetch_add,
    half_to_float,
    i64_at,
    inlined,
    item_bytes,
    read_row,
    u16_at,
)
from ._numba_pool import BLOCK_SIZE, SOURCE_HASH, compile_worker, run, scratch
from ._numba_rows import range_of_row
from ._numba_score_amx import own_tiles, put_tiles, score_pages_on_tiles, scores_on_tiles, tile_bytes
from .layout import KeyPages

_TASK_TOKENS = 1024  # tokens whose logits one task computes
_TASK_PAGES = 64  # pages whose bounds one task computes


def key_logits(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float) -> Tensor:
    """See ``_reference.key_logits``."""
    (rows, heads, _), kv_heads, page_size = query.shape, pages.codes.shape[1], pages.codec.page_size
    query, table, num_pages = last_contiguous(query), block_table.contiguous(), num_pages.contiguous()
    out = torch.empty(rows, heads, table.shape[1] * page_size, dtype=torch.float32)
    mark_absent(out, num_pages, page_size)
    block = new_block()
    put_scoring(block, query, pages, table, num_pages, scaling)
    block[LOGITS], block[TOKENS] = out.data_ptr(), out.shape[2]
    block[CHUNK_PAGES] = max(1, _TASK_TOKENS // page_size)
    block[CHUNKS] = -(-table.shape[1] // block[CHUNK_PAGES])
    kind, shape = kind_of(pages), (page_size, heads // kv_heads, query.shape[2])
    put_tiles(block, *shape, scratch(torch.get_num_threads() * tile_bytes(*shape)))
    worker = _logits_worker(scores_on_tiles(kind), RAW_KIND[query.dtype], kind, *shape[:2])
    run(worker, block.ctypes.data, rows * kv_heads * int(block[CHUNKS]))
    return out


def page_scores(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float) -> Tensor:
    """See ``_reference.page_scores``."""
    return _of_bounds(_bounds_worker(0), query, pages, block_table, num_pages, scaling)


def page_masses(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float) -> Tensor:
    """See ``_reference.page_masses``."""
    return _of_bounds(_bounds_worker(1), query, pages, block_table, num_pages, scaling)


def _of_bounds(
    worker: int, query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float
) -> Tensor:
    """Run a worker that writes one number for each query head and page."""
    (rows, heads, _), kv_heads = query.shape, pages.codes.shape[1]
    query, table, num_pages = last_contiguous(query), block_table.contiguous(), num_pages.contiguous()
    out = torch.empty(rows, heads, table.shape[1], dtype=torch.float32)
    mark_absent(out, num_pages, 1)
    block = new_block()
    put_scoring(block, query, pages, table, num_pages, scaling)
    block[LOGITS], block[TOKENS] = out.data_ptr(), table.shape[1]
    block[CHUNK_PAGES], block[CHUNKS] = _TASK_PAGES, -(-table.shape[1] // _TASK_PAGES)
    block[QUERY_KIND], block[KEY_KIND] = RAW_KIND[query.dtype], kind_of(pages)
    block[PAGE_SIZE], block[Q_PER_KV] = pages.codec.page_size, heads // kv_heads
    run(worker, block.ctypes.data, rows * kv_heads * int(block[CHUNKS]))
    return out


def mark_absent(out: Tensor, num_pages: Tensor, page_size: int) -> None:
    """Fill what no page of a row writes with ``-inf``."""
    for row, count in enumerate(num_pages.tolist()):
        out[row, :, count * page_size :] = -torch.inf


@cache
def _logits_worker(on_tiles: bool, dtype: int, key_kind: int, page_size: int, q_per_kv: int) -> int:
    source = SOURCE_HASH

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, chunks = address_of(arg), block[CHUNKS]
        tasks = block[ROWS] * block[KV_HEADS] * chunks * (source >= 0)
        scratch = np.empty(q_per_kv * (2 * block[KEY_DIM] + 1), np.float32)
        tiles = own_tiles(q_per_kv, block, fetch_add(ticket + 8, 1)) if on_tiles else None
        while True:
            task = fetch_add(ticket, 1)
            if task >= tasks:
                break
            head, chunk = task // chunks, task % chunks
            fold_query(dtype, q_per_kv, block, head, scratch, block[KEY_DIM])
            first = chunk * block[CHUNK_PAGES]
            last = min(first + block[CHUNK_PAGES], row_pages(block, head))
            if first < last:
                score_pages(key_kind, page_size, q_per_kv, block, head, first, last, scratch, tiles)

    return compile_worker(worker, f"key_logits, kind {key_kind}, page {page_size}, q_per_kv {q_per_kv}")


@cache
def _bounds_worker(is_mass: int) -> int:
    source = SOURCE_HASH

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, chunks, key_dim, q_per_kv = address_of(arg), block[CHUNKS], block[KEY_DIM], block[Q_PER_KV]
        tasks = block[ROWS] * block[KV_HEADS] * chunks * (source >= 0)
        scratch = np.empty(q_per_kv * (2 * key_dim + 1), np.float32)
        bounds = np.empty((2, key_dim), np.float32)
        tokens = np.empty(block[PAGE_SIZE] + 3, np.float32)
        while True:
            task = fetch_add(ticket, 1)
            if task >= tasks:
                break
            head, chunk = task // chunks, task % chunks
            fold_query(block[QUERY_KIND], q_per_kv, block, head, scratch, key_dim)
            first = chunk * block[CHUNK_PAGES]
            last = min(first + block[CHUNK_PAGES], row_pages(block, head))
            out = logits_of(block, head, q_per_kv)
            for index in range(first, last):
                read_bounds(block, page_of(block, head, index, 1), bounds, tokens)
                for g in range(q_per_kv):
                    query = scratch[g * key_dim : (g + 1) * key_dim]
                    if is_mass:
                        out[g, index] = _log_mass(query, bounds[0], bounds[1], block[PAGE_SIZE])
                    else:
                        out[g, index] = _bound(query, bounds[0], bounds[1])

    return compile_worker(worker, "page_masses" if is_mass else "page_scores")


@fast
def _bound(query, low, width):
    """Largest dot product with a vector in ``[low, low + width]``."""
    total = np.float32(0)
    for d in range(query.size):
        total += query[d] * low[d] + max(query[d], np.float32(0)) * width[d]
    return total


@fast
def _log_mass(query, low, width, page_size):
    """Log mass of dot products with keys spread normally about the middle of ``[low, low + width]``."""
    mean, variance = np.float32(0), np.float32(0)
    for d in range(query.size):
        spread = query[d] * width[d] * np.float32(0.25)
        mean += query[d] * (low[d] + np.float32(0.5) * width[d])
        variance += spread * spread
    tokens = np.float32(np.log(page_size))
    few = np.sqrt(np.float32(2) * tokens)
    if variance < few * few:
        return mean + tokens + np.float32(0.5) * variance
    return mean + np.sqrt(variance) * few


@exact
def read_bounds(block, page, bounds, tokens):
    """Read the smallest key of each channel of a page and the range above it."""
    key_dim, kind, page_size = block[KEY_DIM], block[KEY_KIND], block[PAGE_SIZE]
    if kind < RAW_BF16:
        lo = carray(u16_at(block[KEY_LO] + 2 * page * key_dim), (key_dim,))
        step = carray(u16_at(block[KEY_STEP] + 2 * page * key_dim), (key_dim,))
        levels = np.float32((1 << kind) - 1)
        for d in range(key_dim):
            bounds[0, d] = half_to_float(lo[d])
            bounds[1, d] = half_to_float(step[d]) * levels
        return
    row_bytes = page_size * item_bytes(kind)
    for d in range(key_dim):
        read_row(kind, block[KEY_CODES] + (page * key_dim + d) * row_bytes, page_size, tokens)
        range_of_row(tokens.ctypes.data, page_size, tokens.ctypes.data + 4 * page_size)
        bounds[0, d] = tokens[page_size]
        bounds[1, d] = tokens[page_size + 1] - tokens[page_size]


@fast
def fold_query(dtype, q_per_kv, block, head, scratch, width):
    """Put the scaled float32 queries of this head into the scratch, ``width`` numbers each."""
    row, kv_head, key_dim = head // block[KV_HEADS], head % block[KV_HEADS], block[KEY_DIM]
    scaling, count = np.float32(float_field(block, SCALING)), block[NUM_REFINED]
    refined, given = carray(i64_at(block[REFINED] + 8 * head * count), (count,)), key_dim - count
    for g in range(q_per_kv):
        start = row * block[QUERY_ROW] + (kv_head * q_per_kv + g) * block[QUERY_HEAD]
        target = scratch[g * width : g * width + key_dim]
        read_row(dtype, block[QUERY] + start * item_bytes(dtype), given, target)
        for d in range(given):
            target[d] *= scaling
        for r in range(count):
            target[given + r] = target[refined[r]]


@fast
def score_pages(key_kind, page_size, q_per_kv, block, head, first, last, scratch, tiles):
    """Write the logits of the scored pages ``first .. last`` of a head; ``tiles`` is None where there are none."""
    literally(key_kind)
    literally(page_size)
    literally(q_per_kv)
    if tiles is not None:
        return score_pages_on_tiles(key_kind, page_size, q_per_kv, block, head, first, last, scratch, tiles)
    out = logits_of(block, head, q_per_kv).ctypes.data
    after = page_of(block, head, first, page_size)
    for index in range(first, last):
        page, after = after, page_of(block, head, min(index + 1, last - 1), page_size)
        _score_page(key_kind, page_size, q_per_kv, block, page, after, scratch, out + 4 * index * page_size)


@fast
def _score_page(key_kind, page_size, q_per_kv, block, page, after, scratch, out):
    """Write the logits of one page."""
    literally(key_kind)
    literally(page_size)
    literally(q_per_kv)
    key_dim = block[KEY_DIM]
    folded = fold_page(key_kind, q_per_kv, block, page, scratch)
    channel_bytes = bytes_of_channel(key_kind, page_size)
    page_bytes = key_dim * channel_bytes
    key_page_logits(
        key_kind, page_size, q_per_kv, block[KEY_CODES] + page * page_bytes, channel_bytes, key_dim,
        folded.ctypes.data, bias_of(scratch, q_per_kv, key_dim).ctypes.data, out, block[TOKENS],
        block[KEY_CODES] + after * page_bytes,
    )  # fmt: skip


@fast
def fold_page(key_kind, q_per_kv, block, page, scratch):
    """Fold a page's steps into the queries of the scratch, its lows into their bias; return the folded queries."""
    literally(key_kind)
    literally(q_per_kv)
    key_dim = block[KEY_DIM]
    bias = bias_of(scratch, q_per_kv, key_dim)
    if key_kind >= RAW_BF16:
        bias[:] = 0
        return scratch[: q_per_kv * key_dim]
    folded = scratch[q_per_kv * key_dim : 2 * q_per_kv * key_dim]
    lo = carray(u16_at(block[KEY_LO] + 2 * page * key_dim), (key_dim,))
    step = carray(u16_at(block[KEY_STEP] + 2 * page * key_dim), (key_dim,))
    for g in range(q_per_kv):
        query = scratch[g * key_dim : (g + 1) * key_dim]
        target = folded[g * key_dim : (g + 1) * key_dim]
        moved = np.float32(0)
        for d in range(key_dim):
            target[d] = query[d] * half_to_float(step[d])
            moved += query[d] * half_to_float(lo[d])
        bias[g] = moved
    return folded


@inlined
def bytes_of_channel(key_kind, page_size):
    """Bytes of one channel of a page."""
    return page_size * item_bytes(key_kind) if key_kind >= RAW_BF16 else page_size * key_kind // 8


@inlined
def bias_of(scratch, q_per_kv, key_dim):
    """What ``key_page_logits`` adds to the logits of each query head."""
    return scratch[2 * q_per_kv * key_dim : (2 * key_dim + 1) * q_per_kv]
