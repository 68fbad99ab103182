"""The int64 parameter block of the prompt workers, and which columns a row attends to.

*Columns* are tokens as matrix tiles see them, in blocks of 64: the sinks, then the packed pages, then the plain pages
of the window, each of these three filled up to whole blocks. Packed and plain columns are counted from the first token
after the sinks, and plain ones begin at a multiple of 64 of these: so a token lies at the same place of a block, and is
summed in the same order, wherever the call begins.
"""

from __future__ import annotations

from numba import carray

from ._numba_numbers import f64_at, inlined
from ._numba_pool import BLOCK_SIZE

COLUMNS = 64  # of a block
STRIP = 16  # rows of a tile
ROWS, KV_HEADS, KEY_DIM, VALUE_DIM = 2, 3, 4, 5
FIRST_HEAD, HEADS = 6, 7  # KV heads of this call
START, SINKS, WINDOW, PAGE_SIZE = 8, 9, 10, 11
QUERY, QUERY_ROW, QUERY_HEAD = 12, 13, 14  # address, elements from row to row and from head to head
OUT = 15
KEY_CODES, KEY_LO, KEY_STEP = 16, 17, 18
VALUE_CODES, VALUE_LO, VALUE_STEP = 19, 20, 21
PLAIN_KEYS, PLAIN_VALUES = 22, 23
TABLE, PLAIN_TABLE = 24, 25  # int32 slots
SINK_PAGES, PACKED_PAGES, WINDOW_PAGES = 26, 27, 28
SINK_BLOCKS, PACKED_BLOCKS, WINDOW_BLOCKS, WINDOW_START = 29, 30, 31, 32  # blocks; block of the first plain column
KEYS, VALUES = 33, 34  # bfloat16 [heads, blocks, pairs of channels, 64, 2], [heads, blocks, 32, value_wide, 2]
BUFFERS, BUFFER_BYTES = 35, 36  # of each thread
STATS = 37  # float64 [rows, query heads, 5], or 0
MIN_KEEP, MIN_SPARSE_LEN = 38, 39
SCALING, P = 40, 41  # float64
TILES = 42  # configuration of matrix tiles, see _numba_amx


@inlined
def float_field(block, index):
    """Return one of the block's float64 numbers."""
    return carray(f64_at(block.ctypes.data), (BLOCK_SIZE,))[index]


@inlined
def wide(dim):
    """Numbers of a key in tiles: steps of 32."""
    return (dim + 31) // 32 * 32


@inlined
def wide_value(dim):
    """Numbers of a value in tiles: vectors of 16."""
    return (dim + 15) // 16 * 16


@inlined
def num_blocks(block):
    """Blocks of columns of a KV head."""
    return block[SINK_BLOCKS] + block[PACKED_BLOCKS] + block[WINDOW_BLOCKS]


@inlined
def row_pages(block, row):
    """Pages that a row reads packed."""
    return max(0, (block[START] + row - block[SINKS] - block[WINDOW]) // block[PAGE_SIZE])


@inlined
def row_end(block, row):
    """Tokens after the sinks, the row's own included."""
    return max(0, block[START] + row + 1 - block[SINKS])


@inlined
def keys_of(block, head):
    """Address of the unpacked keys of the ``head``-th KV head of this call."""
    return block[KEYS] + 2 * head * num_blocks(block) * COLUMNS * wide(block[KEY_DIM])


@inlined
def values_of(block, head):
    """Address of the unpacked values of the ``head``-th KV head of this call."""
    return block[VALUES] + 2 * head * num_blocks(block) * COLUMNS * wide_value(block[VALUE_DIM])
