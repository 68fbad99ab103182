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
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ._numba_attend import BLOCK_TOKENS, merge, scratch_size
from ._numba_block import (
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
    NUM_STRIPS,
    PARTIALS,
    PLAIN_KEYS,
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
    new_block,
    strip_rows,
)
from ._numba_chunks import attend_pages, attend_plain
from ._numba_numbers import (
    RAW_BF16,
    RAW_KIND,
    address_of,
    f32_at,
    fetch_add,
    i32_at,
)
from ._numba_pool import BLOCK_SIZE, SOURCE_HASH, compile_worker, run, scratch
from ._numba_score import fold_query
from ._numba_score_amx import own_tiles, put_tiles, scores_on_tiles, tile_bytes
from ._numba_shared_pages import AT_ONCE, query_size, score_shared_pages
from ._numba_sparse import attend_kept, count_dense, prune
from ._numba_window import attend_window
from .layout import DecodeCall, KeyPages, PlainTokens, ValuePages

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
    refined: Tensor | None = None,
) -> Tensor:
    """See ``_reference.decode_attention``."""
    values, paged = plain.values.shape, (0, 0, 0)
    if plain_table is not None:
        plain_table = plain_table.contiguous()
        paged = plain_table.data_ptr(), plain_table.shape[1], num_sinks
        values = torch.Size((query.shape[0], values[1], plain_table.shape[1] * values[2], values[3]))
    listed = (0, 0, 0)
    if candidates is not None:
        candidates = candidates.contiguous()
        listed = candidates.data_ptr(), candidates.shape[2], 0
        if candidate_tokens is not None:
            candidate_tokens = candidate_tokens.contiguous()
            listed = candidates.data_ptr(), candidates.shape[2], candidate_tokens.data_ptr()
    listed_strips = (0, 0)
    if strips is not None:
        strips = strips.contiguous()
        listed_strips = strips.data_ptr(), strips.shape[0] - 1
    settings = *listed, min_keep, min_sparse_len, _address(stats), scaling, p, *paged, *listed_strips
    launch = _Launch(key_pages, value_pages, plain, query.shape[1], values, refined, settings)
    return launch(query, new_key, new_value, block_table, num_pages, plain_len, listed[1])


def prepare_decode(
    key_pages: KeyPages,
    value_pages: ValuePages,
    plain: PlainTokens,
    *,
    heads: int,
    scaling: float,
    p: float = 1.0,
    min_keep: int = 0,
    min_sparse_len: int = 0,
    stats: Tensor | None = None,
    refined: Tensor | None = None,
) -> DecodeCall:
    """See ``_reference.prepare_decode``."""
    settings = 0, 0, 0, min_keep, min_sparse_len, _address(stats), scaling, p, 0, 0, 0, 0, 0
    return _Launch(key_pages, value_pages, plain, heads, plain.values.shape, refined, settings, stats)


_TICKETS = struct.Struct("=2q")  # of `run`, at the start of a block
_STEP = struct.Struct("=20q2d7q")  # what changes from step to step, from QUERY on


class _Launch:
    """Runs the worker over the same tensors, which it keeps, step after step.

    Args:
        heads: query heads.
        values: ``[rows, KV heads, plain columns, value dim]``.
        settings: numbers of the block from CANDIDATES to NUM_STRIPS.
        stats: what else must stay as long as this does.
    """

    def __init__(
        self,
        key_pages: KeyPages,
        value_pages: ValuePages,
        plain: PlainTokens,
        heads: int,
        values: torch.Size,
        refined: Tensor | None,
        settings: tuple[float, ...],
        stats: Tensor | None = None,
    ) -> None:
        refined = None if refined is None else refined.contiguous()
        self._pages, self._kept = (key_pages, value_pages, plain), (refined, stats)
        self._shape = values[0], heads, key_pages.form[2], values
        self._page_size, self._dtype = key_pages.codec.page_size, plain.keys.dtype
        self._settings = *settings, *((0, 0) if refined is None else (refined.data_ptr(), refined.shape[2]))
        self._size: tuple[int, int] | None = None
        self._work = 0

    def __call__(
        self,
        query: Tensor,
        new_key: Tensor | None,
        new_value: Tensor | None,
        block_table: Tensor,
        num_pages: Tensor,
        plain_len: Tensor,
        candidates: int = 0,
    ) -> Tensor:
        columns = block_table.shape[1]
        size = max(columns, candidates, 1), torch.get_num_threads()
        if size != self._size:
            self._size, self._work = size, 0
            self._num_bytes = _work_bytes(*self._shape, *size, self._page_size)
        work = scratch(self._num_bytes)
        if work != self._work:
            self._work, self._prepared = work, self._prepare(work)
        block, address, worker, threads, done, done_bytes = self._prepared
        query, block_table = last_contiguous(query), block_table.contiguous()
        num_pages, plain_len = num_pages.contiguous(), plain_len.contiguous()
        rows, heads, _, values = self._shape
        out = torch.empty(rows, heads, values[3], dtype=self._dtype)
        appended = (0,) * 6
        if new_key is not None and new_value is not None:
            new_key, new_value = last_contiguous(new_key), last_contiguous(new_value)
            appended = (
                new_key.data_ptr(), new_key.stride(0), new_key.stride(1),
                new_value.data_ptr(), new_value.stride(0), new_value.stride(1),
            )  # fmt: skip
        _TICKETS.pack_into(block, 0, 0, 0)
        _STEP.pack_into(
            block, 8 * QUERY, query.data_ptr(), query.stride(0), query.stride(1), out.data_ptr(),
            block_table.data_ptr(), columns, num_pages.data_ptr(), plain_len.data_ptr(), *appended, *self._settings,
        )  # fmt: skip
        ctypes.memset(done, 0, done_bytes)
        run(worker, address, threads)
        return out

    def _prepare(self, work: int) -> tuple[Any, ...]:
        assert self._size is not None
        key_pages, value_pages, plain = self._pages
        dtype, key_codec, value_codec = RAW_KIND[self._dtype], key_pages.codec, value_pages.codec
        return _prepared(
            *self._shape, *self._size, work, dtype,
            dtype if key_codec.is_raw else key_codec.bits, dtype if value_codec.is_raw else value_codec.bits,
            key_codec.page_size, value_codec.group_size,
            key_pages.codes.data_ptr(), key_pages.lo.data_ptr(), key_pages.step.data_ptr(),
            value_pages.codes.data_ptr(), value_pages.lo.data_ptr(), value_pages.step.data_ptr(),
            plain.keys.data_ptr(), plain.values.data_ptr(),
        )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
        tile_bytes(page_size, heads // kv_heads, key_dim) * threads,
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
def _prepared(
    rows: int, heads: int, key_dim: int, values: torch.Size, columns: int, threads: int, work: int,
    dtype: int, key_kind: int, value_kind: int, page_size: int, group_size: int, *storage: int,
) -> tuple[ctypes.Array[ctypes.c_char], int, int, int, int, int]:  # fmt: skip
    """What stays as it is while no tensor moves: the block and its address, its worker, threads, done counters, bytes.

    The block belongs to the calling thread, as ``work``, that thread's scratch, does.
    """
    _, kv_heads, capacity, value_dim = values
    q_per_kv, chunks = heads // kv_heads, _chunks(columns, page_size)
    block = new_block()
    block[[ROWS, KV_HEADS, KEY_DIM, VALUE_DIM, CAPACITY]] = rows, kv_heads, key_dim, value_dim, capacity
    block[[KEY_CODES, KEY_LO, KEY_STEP, VALUE_CODES, VALUE_LO, VALUE_STEP, PLAIN_KEYS, PLAIN_VALUES]] = storage
    sizes = _work_sizes(rows, heads, key_dim, values, columns, threads, page_size)
    logits, plain_logits, partials, done, flags, positions, tiles, _ = accumulate(sizes, initial=work)
    block[[LOGITS, TOKENS, PLAIN_LOGITS, PARTIALS, CHUNKS, CHUNK_PAGES, DONE, FLAGS, POSITIONS]] = (
        logits, columns * page_size, plain_logits, partials, chunks, max(1, _TASK_TOKENS // page_size), done,
        flags, positions,
    )  # fmt: skip
    put_tiles(block, page_size, q_per_kv, key_dim, tiles)
    if value_kind >= RAW_BF16:
        group_size = value_dim
    worker = _decode_worker(
        scores_on_tiles(key_kind), dtype, key_kind, value_kind, page_size, q_per_kv, value_dim, group_size
    )
    worth = -(-rows * kv_heads * (columns * page_size + capacity) * key_dim // _GRAIN)
    buffer = ctypes.create_string_buffer(block.tobytes(), block.nbytes)
    return buffer, ctypes.addressof(buffer), worker, min(rows * kv_heads * chunks, worth), done, 8 * rows * kv_heads


@cache
def _decode_worker(
    on_tiles: bool,
    dtype: int,
    key_kind: int,
    value_kind: int,
    page_size: int,
    q_per_kv: int,
    value_dim: int,
    group_size: int,
) -> int:
    source = SOURCE_HASH

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, chunks, tokens = address_of(arg), block[CHUNKS], block[TOKENS]
        tasks = (block[NUM_STRIPS] if block[STRIPS] != 0 else block[ROWS]) * block[KV_HEADS] * chunks * (source >= 0)
        scratch = np.empty(scratch_size(block[KEY_DIM], q_per_kv, value_dim, group_size), np.float32)
        rows = np.empty(3 * BLOCK_TOKENS, np.int64)
        thread = fetch_add(ticket + 8, 1)
        own = block[POSITIONS] + 12 * tokens * thread
        positions = carray(i32_at(own), (tokens,))
        near = carray(f32_at(own + 4 * tokens), (2, tokens))
        totals = np.empty((q_per_kv, 3), np.float32)
        at_once = AT_ONCE if block[STRIPS] != 0 else 0
        queries = np.zeros((at_once, query_size(block, q_per_kv)), np.float32)
        codes = np.empty(0 if on_tiles else min(at_once, 1) * block[KEY_DIM] * page_size, np.float32)
        tiles = own_tiles(q_per_kv, block, thread) if on_tiles else None
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
                        first, first + block[CHUNK_PAGES], queries, codes, tiles,
                    )  # fmt: skip
            for row in range(first_row, last_row):
                head = row * block[KV_HEADS] + kv_head
                if chunk == 0 or not is_shared:
                    fold_query(dtype, q_per_kv, block, head, scratch, block[KEY_DIM])
                if chunk == 0 and block[PLAIN_TABLE] != 0:
                    attend_window(dtype, page_size, q_per_kv, value_dim, block, head, scratch, rows)
                elif chunk == 0:
                    attend_plain(dtype, q_per_kv, value_dim, block, head, scratch, rows)
                else:
                    attend_pages(
                        key_kind, value_kind, page_size, q_per_kv, value_dim, group_size, block, head, chunk,
                        is_shared, scratch, rows, tiles,
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
