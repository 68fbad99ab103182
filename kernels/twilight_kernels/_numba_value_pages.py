"""Packing and unpacking one page of values on CPUs, bit for bit as ``_reference`` does it."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import carray

from ._numba_numbers import RAW_BF16, address_of, exact, fetch_add, item_bytes, read_row, write_row
from ._numba_page_block import (
    BITS,
    CODES,
    DIM,
    GROUP_SIZE,
    GROUPS,
    HEADS,
    KIND,
    LOAD,
    MEASURE,
    PAGES,
    ROUND,
    TOKENS,
    WRITE,
    float_row,
    invert,
    place,
    propose_scales,
    read_scales,
    require_finite,
    stored_page,
    token_stride,
    write_scales,
)
from ._numba_planes import pack_codes, unpack_codes
from ._numba_pool import BLOCK_SIZE, SOURCE_HASH, compile_worker
from ._numba_rows import dequantize_row, quantize_row, range_of_row


@cache
def value_worker() -> int:
    source = SOURCE_HASH

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, tasks = address_of(arg), block[PAGES] * block[HEADS] * (source >= 0)
        tokens, dim = block[TOKENS], block[DIM]
        numbers, codes = np.empty(dim, np.float32), np.empty(dim, np.uint8)
        scales = np.empty((3, tokens * block[GROUPS]), np.float32)
        while True:
            task = fetch_add(ticket, 1)
            if task >= tasks:
                break
            if block[BITS] >= RAW_BF16:
                _move_raw_values(block, task, block[ROUND], numbers)
            elif block[ROUND] == MEASURE:
                _measure_values(block, task, numbers, scales)
            elif block[ROUND] == WRITE:
                _write_values(block, task, numbers, codes, scales)
            else:
                _read_values(block, task, numbers, codes, scales)

    return compile_worker(worker, "value pages")


@exact
def pack_values(block, task, numbers, codes, scales):
    """Do both rounds of one page at once: raise the flag, too, if it cannot be stored."""
    if block[BITS] >= RAW_BF16:
        _move_raw_values(block, task, MEASURE, numbers)
        _move_raw_values(block, task, WRITE, numbers)
    else:
        _measure_values(block, task, numbers, scales)
        _write_values(block, task, numbers, codes, scales)


@exact
def _measure_values(block, task, numbers, scales):
    """Work out the scales of one page; raise the flag if it cannot be stored."""
    tokens, dim, bits = block[TOKENS], block[DIM], block[BITS]
    kind, x, stride = block[KIND], place(block, task), token_stride(block)
    groups, size = block[GROUPS], block[GROUP_SIZE]
    found = np.empty(3, np.float32)
    for t in range(tokens):
        row = float_row(kind, x + t * stride, dim, numbers)
        for c in range(groups):
            range_of_row(row + 4 * c * size, min(size, dim - c * size), found.ctypes.data)
            scales[0, t * groups + c], scales[1, t * groups + c], scales[2, t * groups + c] = found
    require_finite(block, scales[2])
    for i in range(tokens * groups):
        scales[1, i] = (scales[1, i] - scales[0, i]) / np.float32((1 << bits) - 1)
    propose_scales(block, task * tokens * groups, scales[0], scales[1])


@exact
def _write_values(block, task, numbers, codes, scales):
    """Write the scales and codes of one page."""
    tokens, dim, bits = block[TOKENS], block[DIM], block[BITS]
    kind, x, stride = block[KIND], place(block, task), token_stride(block)
    groups, size, row_bytes = block[GROUPS], block[GROUP_SIZE], block[DIM] * bits // 8
    start, levels = stored_page(block, task) * tokens, np.float32((1 << bits) - 1)
    write_scales(block, start * groups, task * tokens * groups, scales[0], scales[1])
    invert(scales[1])
    lo, inverse = scales[0].ctypes.data, scales[1].ctypes.data
    for t in range(tokens):
        row = float_row(kind, x + t * stride, dim, numbers)
        for c in range(groups):
            at, count = 4 * (t * groups + c), min(size, dim - c * size)
            quantize_row(0, row + 4 * c * size, count, lo + at, inverse + at, levels, codes.ctypes.data + c * size)
        pack_codes(codes.ctypes.data, dim, bits, block[CODES] + (start + t) * row_bytes)


@exact
def _read_values(block, task, numbers, codes, scales):
    """Dequantize one page."""
    tokens, dim, bits = block[TOKENS], block[DIM], block[BITS]
    kind, x, stride = block[KIND], place(block, task), token_stride(block)
    groups, size, row_bytes = block[GROUPS], block[GROUP_SIZE], block[DIM] * bits // 8
    start = stored_page(block, task) * tokens
    read_scales(block, start * groups, scales[0], scales[1])
    lo, step, row = scales[0].ctypes.data, scales[1].ctypes.data, numbers.ctypes.data
    for t in range(tokens):
        unpack_codes(block[CODES] + (start + t) * row_bytes, dim, bits, codes.ctypes.data)
        for c in range(groups):
            at, count = 4 * (t * groups + c), min(size, dim - c * size)
            dequantize_row(0, codes.ctypes.data + c * size, count, lo + at, step + at, row + 4 * c * size)
        write_row(kind, x + t * stride, dim, numbers)


@exact
def _move_raw_values(block, task, turn, numbers):
    """Check one page, copy it in, or copy it out, as the round says."""
    tokens, dim, bits = block[TOKENS], block[DIM], block[BITS]
    kind, x, stride = block[KIND], place(block, task), token_stride(block)
    start, row_bytes = stored_page(block, task) * tokens, block[DIM] * item_bytes(bits)
    for t in range(tokens):
        if turn == LOAD:
            read_row(bits, block[CODES] + (start + t) * row_bytes, dim, numbers)
            write_row(kind, x + t * stride, dim, numbers)
        elif turn == WRITE:
            read_row(kind, x + t * stride, dim, numbers)
            write_row(bits, block[CODES] + (start + t) * row_bytes, dim, numbers)
        else:
            read_row(kind, x + t * stride, dim, numbers)
            require_finite(block, numbers)
