"""The int64 parameter block of the prefill workers, and where a task's strip lies."""

from __future__ import annotations

from numba import carray

from ._numba_numbers import f64_at, fast, i32_at, inlined
from ._numba_pool import BLOCK_SIZE

TASKS = 2
QUERY = 3  # address, then elements from row to row of the batch, from head to head, from position to position
KEYS = 7  # likewise
VALUES = 11
OUT = 15
ROWS, TOTAL, DIM, VALUE_DIM, KV_HEADS = 19, 20, 21, 22, 23
STRIP, SAMPLES, WINDOW, SINKS = 24, 25, 26, 27
PADDING = 28  # int32 [rows of the batch]
MASK, STRIPS = 29, 30  # uint8 [tasks, ceil(TOTAL / 8)], strips of a head
REPORT = 31  # float32 [tasks, 5]
SCALING, ALPHA, FLOOR = 32, 33, 34  # float64
TILES = 35  # configuration of matrix tiles, see _numba_amx
KEYS_LOW, VALUES_LOW = 36, 37  # bytes from the high parts of numbers to their low parts, see _numba_stripe_amx


@inlined
def float_field(block, index):
    """Return one of the block's float64 numbers."""
    return carray(f64_at(block.ctypes.data), (BLOCK_SIZE,))[index]


@fast
def strip_of(block, task):
    """Return ``row of the batch, KV head, padding, first query row, one after the last``; equal if none."""
    strip = task % block[STRIPS]
    head = task // block[STRIPS]
    row, kv_head = head // block[KV_HEADS], head % block[KV_HEADS]
    pad = carray(i32_at(block[PADDING]), (row + 1,))[row]
    lead = block[TOTAL] - block[ROWS] - pad  # real position of query row 0
    start = max(0, -lead)
    if strip > 0:
        start += block[STRIP] - (lead + start) % block[STRIP] + (strip - 1) * block[STRIP]
    start = min(start, block[ROWS])
    end = min(block[ROWS], start + block[STRIP] - (lead + start) % block[STRIP])
    return row, kv_head, pad, start, end


@inlined
def slab_start(block, pad, position):
    """First key of the window of a strip that begins at ``position``."""
    return max(pad, position - block[WINDOW])
