"""Attention of neighbouring rows of one sequence on matrix tiles of CPUs, in bfloat16.

Definition: ``_reference.prompt_attention``. The pages that the rows list are unpacked once for all of them, then each
task attends sixteen rows of the query heads of one KV head: every logit is written down, weights take their place, what
is not kept becomes zero, and values are summed where anything is kept. What is computed for a row does not depend on
the others: tokens stand in the same order, at places fixed by their position.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ._numba_amx import CONFIG_ADDRESS
from ._numba_block import last_contiguous
from ._numba_ir import LANES
from ._numba_numbers import RAW_BF16, address_of, fetch_add
from ._numba_pool import BLOCK_SIZE, SOURCE_HASH, compile_worker, run, scratch
from ._numba_prompt_attend import attend_strip
from ._numba_prompt_block import (
    BUFFER_BYTES,
    BUFFERS,
    COLUMNS,
    FIRST_HEAD,
    HEADS,
    KEY_CODES,
    KEY_DIM,
    KEYS,
    KV_HEADS,
    MIN_KEEP,
    MIN_SPARSE_LEN,
    OUT,
    PACKED_BLOCKS,
    PACKED_PAGES,
    PAGE_SIZE,
    PLAIN_KEYS,
    PLAIN_TABLE,
    PLAIN_VALUES,
    QUERY,
    ROWS,
    SCALING,
    SINK_BLOCKS,
    SINK_PAGES,
    SINKS,
    START,
    STATS,
    STRIP,
    TABLE,
    TILES,
    VALUE_CODES,
    VALUE_DIM,
    VALUES,
    WINDOW,
    WINDOW_BLOCKS,
    WINDOW_PAGES,
    WINDOW_START,
    P,
)
from ._numba_prompt_unpack import unpack_worker
from .layout import KeyPages, PlainTokens, ValuePages

_UNPACKED_BYTES = 1 << 26  # of pages that lie unpacked at a time, or those of one KV head
_GRAIN = 1 << 22  # products of a row, head, column and channel that are worth a thread


def prompt_attention(
    query: Tensor,
    key_pages: KeyPages,
    value_pages: ValuePages,
    plain: PlainTokens,
    *,
    block_table: Tensor,
    plain_table: Tensor,
    start: int,
    num_sinks: int,
    window: int,
    scaling: float,
    p: float = 1.0,
    min_keep: int = 0,
    min_sparse_len: int = 0,
    stats: Tensor | None = None,
) -> Tensor:
    """See ``_reference.prompt_attention``."""
    query, block_table, plain_table = last_contiguous(query), block_table.contiguous(), plain_table.contiguous()
    (rows, heads, key_dim), (_, kv_heads, page_size, value_dim) = query.shape, plain.values.shape
    out = torch.empty(rows, heads, value_dim, dtype=query.dtype)
    block = np.zeros(BLOCK_SIZE, np.int64)
    block[[ROWS, KV_HEADS, KEY_DIM, VALUE_DIM]] = rows, kv_heads, key_dim, value_dim
    block[[START, SINKS, WINDOW, PAGE_SIZE]] = start, num_sinks, window, page_size
    block[QUERY : QUERY + 3] = query.data_ptr(), query.stride(0), query.stride(1)
    block[OUT] = out.data_ptr()
    block[KEY_CODES : KEY_CODES + 3] = key_pages.codes.data_ptr(), key_pages.lo.data_ptr(), key_pages.step.data_ptr()
    block[VALUE_CODES : VALUE_CODES + 3] = (
        value_pages.codes.data_ptr(), value_pages.lo.data_ptr(), value_pages.step.data_ptr()
    )  # fmt: skip
    block[[PLAIN_KEYS, PLAIN_VALUES]] = plain.keys.data_ptr(), plain.values.data_ptr()
    block[[TABLE, PLAIN_TABLE]] = block_table.data_ptr(), plain_table.data_ptr()
    block[[STATS, MIN_KEEP, MIN_SPARSE_LEN]] = 0 if stats is None else stats.data_ptr(), min_keep, min_sparse_len
    block[TILES] = CONFIG_ADDRESS
    block.view(np.float64)[[SCALING, P]] = scaling, p
    columns = _put_columns(block)
    _run(block, columns, heads // kv_heads, key_pages, value_pages)
    return out


def _put_columns(block: np.ndarray) -> int:
    """Enter which columns there are; return how many."""
    rows, start, sinks, window, size = (int(number) for number in block[[ROWS, START, SINKS, WINDOW, PAGE_SIZE]])
    first, last = (max(0, (at - sinks - window) // size) for at in (start, start + rows - 1))
    end = max(0, start + rows - sinks)
    begin = first * size // COLUMNS
    block[[SINK_PAGES, PACKED_PAGES, WINDOW_PAGES]] = -(-sinks // size), last, -(-end // size) - first
    blocks = -(-sinks // COLUMNS), -(-last * size // COLUMNS), -(-end // COLUMNS) - begin
    block[[SINK_BLOCKS, PACKED_BLOCKS, WINDOW_BLOCKS, WINDOW_START]] = *blocks, begin
    return COLUMNS * sum(blocks)


def _run(block: np.ndarray, columns: int, q_per_kv: int, key_pages: KeyPages, value_pages: ValuePages) -> None:
    """Unpack and attend, as many KV heads at a time as may lie unpacked."""
    rows, kv_heads, key_dim, value_dim = (int(n) for n in block[[ROWS, KV_HEADS, KEY_DIM, VALUE_DIM]])
    key_bytes, value_bytes = 2 * columns * -(-key_dim // 32) * 32, 2 * columns * -(-value_dim // 16) * 16
    at_once = min(kv_heads, max(1, _UNPACKED_BYTES // (key_bytes + value_bytes)))
    buffer = 4 * (q_per_kv * STRIP + 1) * (columns + LANES)
    threads = torch.get_num_threads()
    work = scratch(at_once * (key_bytes + value_bytes) + threads * buffer)
    block[[KEYS, VALUES]] = work, work + at_once * key_bytes
    block[[BUFFERS, BUFFER_BYTES]] = work + at_once * (key_bytes + value_bytes), buffer
    key_kind = RAW_BF16 if key_pages.codec.is_raw else key_pages.codec.bits
    value_kind = RAW_BF16 if value_pages.codec.is_raw else value_pages.codec.bits
    group_size = value_dim if value_pages.codec.is_raw else value_pages.codec.group_size
    unpack = unpack_worker(key_kind, value_kind, int(block[PAGE_SIZE]), value_dim, group_size)
    attend = _attend_worker(q_per_kv)
    pages = int(block[[SINK_PAGES, PACKED_PAGES, WINDOW_PAGES]].sum())
    worth = -(-rows * kv_heads * q_per_kv * columns * key_dim // _GRAIN)
    for first in range(0, kv_heads, at_once):
        heads = min(at_once, kv_heads - first)
        block[[FIRST_HEAD, HEADS]] = first, heads
        for worker, tasks in ((unpack, heads * pages), (attend, heads * -(-rows // STRIP))):
            block[:2] = 0
            run(worker, block.ctypes.data, min(tasks, worth))


@cache
def _attend_worker(q_per_kv: int) -> int:
    source = SOURCE_HASH

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, thread = address_of(arg), fetch_add(address_of(arg) + 8, 1)
        tasks = block[HEADS] * ((block[ROWS] + STRIP - 1) // STRIP) * (source >= 0)
        task = fetch_add(ticket, 1)
        while task < tasks:
            attend_strip(q_per_kv, block, tasks - 1 - task, thread)  # the longest first
            task = fetch_add(ticket, 1)

    return compile_worker(worker, f"prompt_attention, q_per_kv {q_per_kv}, matrix tiles")
