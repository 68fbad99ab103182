"""The int64 parameter block of the attention workers: what each number means, and views of what it points at.

A *head* is one KV head of one row, ``row * kv_heads + kv_head``; a *page* is the address unit of one head,
``slot * kv_heads + kv_head``. Numbers 0 and 1 belong to ``_numba_pool.run``.
"""

from __future__ import annotations

import numpy as np
from numba import carray
from torch import Tensor

from ._numba_numbers import RAW_KIND, f32_at, f64_at, fast, i32_at, inlined
from ._numba_pool import BLOCK_SIZE
from .layout import KeyPages, ValuePages

ROWS, KV_HEADS, KEY_DIM, VALUE_DIM = 2, 3, 4, 5
KEY_CODES, KEY_LO, KEY_STEP = 6, 7, 8
VALUE_CODES, VALUE_LO, VALUE_STEP = 9, 10, 11
PLAIN_KEYS, PLAIN_VALUES, CAPACITY = 12, 13, 14
LOGITS, TOKENS = 15, 16  # float32 [heads, q_per_kv, tokens]
PLAIN_LOGITS = 17  # float32 [heads, q_per_kv, capacity]
PARTIALS, CHUNKS = 18, 19  # float32 [heads, chunks, q_per_kv, value_dim + 2], see _numba_attend
CHUNK_PAGES = 20  # pages that one task scores
DONE = 21  # int64 [heads], chunks that are finished
FLAGS = 22  # uint8 [heads, tokens], packed tokens that some query head keeps
POSITIONS = 23  # of each thread: int32 [tokens], then float32 [2, tokens]
QUERY_KIND, KEY_KIND, PAGE_SIZE, Q_PER_KV = 24, 25, 26, 27  # of workers that are not compiled for them
NUM_CHANNELS = PLAIN_KEYS  # of `_numba_channels`, which sees no plain tokens
# from here on what changes with every step, in the order in which `_numba_decode` packs it
QUERY, QUERY_ROW, QUERY_HEAD = 28, 29, 30  # address, elements from row to row and from head to head
OUT = 31
TABLE, TABLE_COLUMNS = 32, 33
NUM_PAGES, PLAIN_LEN = 34, 35
NEW_KEY, NEW_KEY_ROW, NEW_KEY_HEAD = 36, 37, 38  # 0 if no token is appended
NEW_VALUE, NEW_VALUE_ROW, NEW_VALUE_HEAD = 39, 40, 41
CANDIDATES, CANDIDATE_COLUMNS = 42, 43  # 0 if every page is scored
CANDIDATE_TOKENS = 44  # bool [heads, candidate columns * page_size], or 0 if all tokens of a page are
MIN_KEEP, MIN_SPARSE_LEN = 45, 46
STATS = 47  # float64 [heads * q_per_kv, 5], or 0
SCALING, P = 48, 49  # float64
PLAIN_TABLE, PLAIN_COLUMNS, NUM_SINKS = 50, 51, 52  # 0 if plain tokens are not in pages
STRIPS, NUM_STRIPS = 53, 54  # int32 [strips + 1]; 0 if every row is one of its own
REFINED, NUM_REFINED = 55, 56  # int64 [heads, NUM_REFINED], or 0: channels that the last ones of a key hold rests of
TILES, TILE_WORK, TILE_BYTES = 57, 58, 59  # configuration of the matrix tiles, their scratch, bytes of it a thread


def new_block() -> np.ndarray:
    """Return a block of zeros."""
    return np.zeros(BLOCK_SIZE, np.int64)


def last_contiguous(x: Tensor) -> Tensor:
    """Return ``x`` if its last axis is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def kind_of(pages: KeyPages | ValuePages) -> int:
    """Return how the codes of ``pages`` are stored."""
    return RAW_KIND[pages.codes.dtype] if pages.codec.is_raw else pages.codec.bits


def put_scoring(
    block: np.ndarray, query: Tensor, pages: KeyPages, table: Tensor, num_pages: Tensor, scaling: float
) -> None:
    """Enter what scoring pages needs; the caller keeps the tensors, contiguous in their last axis, alive."""
    block[ROWS], block[KV_HEADS], block[KEY_DIM] = query.shape[0], pages.codes.shape[1], query.shape[2]
    block[QUERY : QUERY + 3] = query.data_ptr(), query.stride(0), query.stride(1)
    block[KEY_CODES : KEY_CODES + 3] = pages.codes.data_ptr(), pages.lo.data_ptr(), pages.step.data_ptr()
    block[TABLE], block[TABLE_COLUMNS], block[NUM_PAGES] = (
        table.data_ptr(),
        table.shape[1],
        num_pages.data_ptr(),
    )
    block.view(np.float64)[SCALING] = scaling


@inlined
def strip_rows(block, strip):
    """First row of a strip, and the row after its last."""
    if block[STRIPS] == 0:
        return strip, strip + 1
    starts = carray(i32_at(block[STRIPS]), (block[NUM_STRIPS] + 1,))
    return np.int64(starts[strip]), np.int64(starts[strip + 1])


@inlined
def row_pages(block, head):
    """Pages of the row of a head."""
    return np.int64(carray(i32_at(block[NUM_PAGES]), (block[ROWS],))[head // block[KV_HEADS]])


@inlined
def is_long(block, head, page_size):
    """Whether the row is long enough to be selected from and pruned."""
    pages = row_pages(block, head)
    return pages > 0 and pages * page_size >= block[MIN_SPARSE_LEN]


@inlined
def is_sparse(block, head, page_size):
    """Whether the row is pruned, or its candidates are single tokens."""
    return (float_field(block, P) < 1.0 or block[CANDIDATE_TOKENS] != 0) and is_long(block, head, page_size)


@inlined
def float_field(block, index):
    """Return one of the block's float64 numbers."""
    return carray(f64_at(block.ctypes.data), (BLOCK_SIZE,))[index]


@fast
def scored_pages(block, head, page_size):
    """Pages of this head that are scored: the candidates, or all."""
    if block[CANDIDATES] == 0 or not is_long(block, head, page_size):
        return row_pages(block, head)
    columns = block[CANDIDATE_COLUMNS]
    listed = carray(i32_at(block[CANDIDATES] + 4 * head * columns), (columns,))
    count = np.int64(0)
    while count < columns and listed[count] >= 0:
        count += 1
    return count


@fast
def page_of(block, head, index, page_size):
    """Where the ``index``-th scored page of this head is stored."""
    logical = index
    if block[CANDIDATES] != 0 and is_long(block, head, page_size):
        columns = block[CANDIDATE_COLUMNS]
        logical = np.int64(carray(i32_at(block[CANDIDATES] + 4 * head * columns), (columns,))[index])
    row, columns = head // block[KV_HEADS], block[TABLE_COLUMNS]
    slot = np.int64(carray(i32_at(block[TABLE] + 4 * row * columns), (columns,))[logical])
    return slot * block[KV_HEADS] + head % block[KV_HEADS]


@inlined
def logits_of(block, head, q_per_kv):
    """This head's packed logits, ``[q_per_kv, tokens]``."""
    return carray(f32_at(block[LOGITS] + 4 * head * q_per_kv * block[TOKENS]), (q_per_kv, block[TOKENS]))


@inlined
def partial_of(block, head, chunk, q_per_kv, value_dim):
    """One partial result of this head, ``[q_per_kv, value_dim + 2]``."""
    address = block[PARTIALS] + 4 * (head * block[CHUNKS] + chunk) * q_per_kv * (value_dim + 2)
    return carray(f32_at(address), (q_per_kv, value_dim + 2))


@inlined
def stats_of(block, q_per_kv):
    """The caller's counters, ``[rows * query heads, 5]``."""
    return carray(f64_at(block[STATS]), (block[ROWS] * block[KV_HEADS] * q_per_kv, 5))
