"""Decode attention over packed pages on CPUs: select, score, prune, attend in one parallel region.

Definition: ``_reference.decode_attention``. A task is one chunk of pages of one head (chunk 0: the plain
tokens); whoever finishes the last chunk of a head also prunes and attends for it, so no thread ever waits. Where rows
come in strips, a task is that of all its rows.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache, lru_cache
from itertools import accumulate

import numpy as np
import torch
from numba import carray, literally
from torch import Tensor

from ._numba_attend import BLOCK_TOKENS, attend_rows, merge, scratch_size
from ._numba_block import (
    CANDIDATE_TOKENS,
    CAPACITY,
    CHUNK_PAGES,
    CHUNKS,
    DONE,
    FLAGS,
    KEY_CODES,
    KEY_DIM,
    KEY_LO,
    KEY_STEP,
    KV_HEADS,
    LOGITS,
    NEW_KEY,
    NEW_KEY_HEAD,
    NEW_KEY_ROW,
    NEW_VALUE,
    NEW_VALUE_HEAD,
    NEW_VALUE_ROW,
    NUM_STRIPS,
    PARTIALS,
    PLAIN_KEYS,
    PLAIN_LEN,
    PLAIN_LOGITS,
    PLAIN_TABLE,
    PLAIN_VALUES,
    POSITIONS,
    QUERY,
    ROWS,
    STRIPS,
    TOKENS,
    VALUE_CODES,
    VALUE_DIM,
    VALUE_LO,
    VALUE_STEP,
    is_sparse,
    last_contiguous,
    logits_of,
    new_block,
    page_of,
    partial_of,
    scored_pages,
    strip_rows,
)
from ._numba_ir import LANES
from ._numba_lanes import key_page_logits
from ._numba_numbers import (
    LOWEST,
    RAW_BF16,
    RAW_KIND,
    address_of,
    f32_at,
    fast,
    fetch_add,
    i32_at,
    item_bytes,
    read_number,
    write_number,
)
from ._numba_pool import BLOCK_SIZE, SOURCE_HASH, compile_worker, run, scratch
from ._numba_prune import largest
from ._numba_score import bias_of, fold_query, score_pages
from ._numba_shared_pages import AT_ONCE, query_size, score_shared_pages
from ._numba_sparse import attend_kept, count_dense, prune, score_candidates
from ._numba_window import attend_window
from .layout import KeyPages, PlainTokens, ValuePages

_TASK_TOKENS = 1024  # tokens scored by one task
_GRAIN = 1 << 18  # key numbers that are worth a thread: waking one costs as much as 30 us of work


def decode_attention(
    query: Tensor,
    key_pages: KeyPages,
    value_pages: ValuePages,
    plain: PlainTokens,
    *,
    block_table: Tensor,
    num_pages: Tensor,
    plain_len: Tensor,
    scaling: float,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    p: float = 1.0,
    min_keep: int = 0,
    min_sparse_len: int = 0,
    candidates: Tensor | None = None,
    candidate_tokens: Tensor | None = None,
    stats: Tensor | None = None,
    plain_table: Tensor | None = None,
    num_sinks: int = 0,
    strips: Tensor | None = None,
) -> Tensor:
    """See ``_reference.decode_attention``."""
    rows, heads, key_dim = query.shape
    query, table = last_contiguous(query), block_table.contiguous()
    num_pages, plain_len = num_pages.contiguous(), plain_len.contiguous()
    out = torch.empty(rows, heads, plain.values.shape[3], dtype=query.dtype)
    columns, listed = table.shape[1], (0, 0, 0)
    if candidates is not None:
        candidates = candidates.contiguous()
        listed = candidates.data_ptr(), candidates.shape[2], 0
        if candidate_tokens is not None:
            candidate_tokens = candidate_tokens.contiguous()
            listed = candidates.data_ptr(), candidates.shape[2], candidate_tokens.data_ptr()
    appended = (0,) * 6
    if new_key is not None and new_value is not None:
        new_key, new_value = last_contiguous(new_key), last_contiguous(new_value)
        appended = (
            new_key.data_ptr(), new_key.stride(0), new_key.stride(1),
            new_value.data_ptr(), new_value.stride(0), new_value.stride(1),
        )  # fmt: skip
    key_codec, value_codec = key_pages.codec, value_pages.codec
    dtype = RAW_KIND[query.dtype]
    size = max(columns, listed[1], 1), torch.get_num_threads()
    values, paged = plain.values.shape, (0, 0, 0)
    if plain_table is not None:
        plain_table = plain_table.contiguous()
        paged = plain_table.data_ptr(), plain_table.shape[1], num_sinks
        values = torch.Size((rows, values[1], plain_table.shape[1] * values[2], values[3]))
    listed_strips = (0, 0)
    if strips is not None:
        strips = strips.contiguous()
        listed_strips = strips.data_ptr(), strips.shape[0] - 1
    shape = rows, heads, key_dim, values
    num_bytes = _work_bytes(*shape, *size, key_codec.page_size)
    template, worker, threads, done = _template(
        *shape, *size, scratch(num_bytes), dtype,
        dtype if key_codec.is_raw else key_codec.bits, dtype if value_codec.is_raw else value_codec.bits,
        key_codec.page_size, value_codec.group_size,
        key_pages.codes.data_ptr(), key_pages.lo.data_ptr(), key_pages.step.data_ptr(),
        value_pages.codes.data_ptr(), value_pages.lo.data_ptr(), value_pages.step.data_ptr(),
        plain.keys.data_ptr(), plain.values.data_ptr(),
    )  # fmt: skip
    block = ctypes.create_string_buffer(template, len(template))
    _STEP.pack_into(
        block, 8 * QUERY, query.data_ptr(), query.stride(0), query.stride(1), out.data_ptr(),
        table.data_ptr(), columns, num_pages.data_ptr(), plain_len.data_ptr(), *appended, *listed,
        min_keep, min_sparse_len, 0 if stats is None else stats.data_ptr(), scaling, p, *paged, *listed_strips,
    )  # fmt: skip
    ctypes.memset(done, 0, 8 * rows * values[1])
    run(worker, ctypes.addressof(block), threads)
    return out


_STEP = struct.Struct("=20q2d5q")  # what changes from step to step, from QUERY on


@lru_cache(maxsize=1024)
def _work_sizes(
    rows: int, heads: int, key_dim: int, values: torch.Size, columns: int, threads: int, page_size: int
) -> tuple[int, ...]:
    """Bytes of the buffers of one call, each a multiple of 64."""
    _, kv_heads, capacity, value_dim = values
    tokens = columns * page_size
    sizes = (
        4 * rows * heads * tokens,  # logits
        4 * rows * heads * capacity,  # logits of the plain tokens
        4 * rows * heads * _chunks(columns, page_size) * (value_dim + 2),  # partials
        8 * rows * kv_heads,  # finished chunks
        rows * kv_heads * tokens,  # flags
        12 * tokens * threads,  # positions and nearby tokens of each thread
    )
    return tuple(-(-size // 64) * 64 for size in sizes)


@lru_cache(maxsize=1024)
def _work_bytes(
    rows: int, heads: int, key_dim: int, values: torch.Size, columns: int, threads: int, page_size: int
) -> int:
    return sum(_work_sizes(rows, heads, key_dim, values, columns, threads, page_size))


def _chunks(columns: int, page_size: int) -> int:
    """Tasks of one head: the plain tokens, and chunks of pages."""
    return 1 + -(-columns // max(1, _TASK_TOKENS // page_size))


@lru_cache(maxsize=1024)
def _template(
    rows: int, heads: int, key_dim: int, values: torch.Size, columns: int, threads: int, work: int,
    dtype: int, key_kind: int, value_kind: int, page_size: int, group_size: int, *storage: int,
) -> tuple[bytes, int, int, int]:  # fmt: skip
    """What stays as it is while no tensor moves: the block, its worker, the tasks, the done counters."""
    _, kv_heads, capacity, value_dim = values
    q_per_kv, chunks = heads // kv_heads, _chunks(columns, page_size)
    block = new_block()
    block[[ROWS, KV_HEADS, KEY_DIM, VALUE_DIM, CAPACITY]] = rows, kv_heads, key_dim, value_dim, capacity
    block[[KEY_CODES, KEY_LO, KEY_STEP, VALUE_CODES, VALUE_LO, VALUE_STEP, PLAIN_KEYS, PLAIN_VALUES]] = storage
    sizes = _work_sizes(rows, heads, key_dim, values, columns, threads, page_size)
    logits, plain_logits, partials, done, flags, positions, _ = accumulate(sizes, initial=work)
    block[[LOGITS, TOKENS, PLAIN_LOGITS, PARTIALS, CHUNKS, CHUNK_PAGES, DONE, FLAGS, POSITIONS]] = (
        logits, columns * page_size, plain_logits, partials, chunks, max(1, _TASK_TOKENS // page_size), done,
        flags, positions,
    )  # fmt: skip
    if value_kind >= RAW_BF16:
        group_size = value_dim
    worker = _decode_worker(dtype, key_kind, value_kind, page_size, q_per_kv, value_dim, group_size)
    worth = -(-rows * kv_heads * (columns * page_size + capacity) * key_dim // _GRAIN)
    return block.tobytes(), worker, min(rows * kv_heads * chunks, worth), done


@cache
def _decode_worker(
    dtype: int, key_kind: int, value_kind: int, page_size: int, q_per_kv: int, value_dim: int, group_size: int
) -> int:
    source = SOURCE_HASH

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, chunks, tokens = address_of(arg), block[CHUNKS], block[TOKENS]
        tasks = (block[NUM_STRIPS] if block[STRIPS] != 0 else block[ROWS]) * block[KV_HEADS] * chunks * (source >= 0)
        scratch = np.empty(scratch_size(block[KEY_DIM], q_per_kv, value_dim, group_size), np.float32)
        rows = np.empty(2 * BLOCK_TOKENS, np.int64)
        own = block[POSITIONS] + 12 * tokens * fetch_add(ticket + 8, 1)
        positions = carray(i32_at(own), (tokens,))
        near = carray(f32_at(own + 4 * tokens), (2, tokens))
        totals = np.empty((q_per_kv, 3), np.float32)
        at_once = AT_ONCE if block[STRIPS] != 0 else 0
        queries = np.empty((at_once, query_size(block, q_per_kv)), np.float32)
        codes = np.empty(min(at_once, 1) * block[KEY_DIM] * page_size, np.float32)
        while True:
            task = fetch_add(ticket, 1)
            if task >= tasks:
                break
            unit, chunk = task // chunks, task % chunks
            strip, kv_head = unit // block[KV_HEADS], unit % block[KV_HEADS]
            first_row, last_row = strip_rows(block, strip)
            is_shared = last_row - first_row > 1
            if is_shared and chunk > 0:
                first = (chunk - 1) * block[CHUNK_PAGES]
                for start in range(first_row, last_row, AT_ONCE):
                    score_shared_pages(
                        dtype, key_kind, page_size, q_per_kv, block, kv_head, start, min(start + AT_ONCE, last_row),
                        first, first + block[CHUNK_PAGES], queries, codes,
                    )  # fmt: skip
            for row in range(first_row, last_row):
                head = row * block[KV_HEADS] + kv_head
                if chunk == 0 or not is_shared:
                    fold_query(dtype, q_per_kv, block, head, scratch)
                if chunk == 0 and block[PLAIN_TABLE] != 0:
                    attend_window(dtype, page_size, q_per_kv, value_dim, block, head, scratch, rows)
                elif chunk == 0:
                    _plain_chunk(dtype, q_per_kv, value_dim, block, head, scratch, rows)
                else:
                    _page_chunk(
                        key_kind, value_kind, page_size, q_per_kv, value_dim, group_size, block, head, chunk,
                        is_shared, scratch, rows,
                    )  # fmt: skip
            if fetch_add(block[DONE] + 8 * unit, 1) < chunks - 1:
                continue
            for row in range(first_row, last_row):
                head = row * block[KV_HEADS] + kv_head
                if is_sparse(block, head, page_size):
                    prune(page_size, q_per_kv, value_dim, block, head, near, totals)
                    attend_kept(
                        value_kind, page_size, q_per_kv, value_dim, group_size, block, head, scratch, rows,
                        positions, totals,
                    )  # fmt: skip
                    merge(dtype, q_per_kv, value_dim, block, head, 2)
                else:
                    merge(dtype, q_per_kv, value_dim, block, head, chunks)
                    count_dense(page_size, q_per_kv, block, head)

    name = (
        f"decode_attention, key kind {key_kind}, value kind {value_kind}, page {page_size}, "
        f"q_per_kv {q_per_kv}, value_dim {value_dim}"
    )
    return compile_worker(worker, name)


@fast
def _plain_chunk(dtype, q_per_kv, value_dim, block, head, scratch, rows):
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
    for d in range(key_dim):
        number = read_number(dtype, block[NEW_KEY], start + d)
        write_number(dtype, block[PLAIN_KEYS], (head * key_dim + d) * capacity + column, number)
    start = row * block[NEW_VALUE_ROW] + kv_head * block[NEW_VALUE_HEAD]
    for d in range(value_dim):
        number = read_number(dtype, block[NEW_VALUE], start + d)
        write_number(dtype, block[PLAIN_VALUES], (head * capacity + column) * value_dim + d, number)


@fast
def _page_chunk(
    key_kind, value_kind, page_size, q_per_kv, value_dim, group_size, block, head, chunk, is_scored, scratch, rows
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
        score_candidates(key_kind, page_size, q_per_kv, block, head, first, last, scratch)
    else:
        score_pages(key_kind, page_size, q_per_kv, block, head, first, last, scratch)
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
