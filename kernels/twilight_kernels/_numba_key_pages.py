"""Packing and unpacking one page of keys on CPUs, bit for bit as ``_reference`` does it."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import carray

from ._numba_numbers import (
    ANY,
    RAW_BF16,
    address_of,
    exact,
    f64_at,
    fetch_add,
    item_bytes,
    read_row,
    u8_at,
    write_row,
)
from ._numba_page_block import (
    BITS,
    CLIP,
    CODES,
    DIM,
    HEADS,
    KIND,
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
from ._numba_rows import dequantize_row, quantize_row


@cache
def key_worker() -> int:
    source = SOURCE_HASH

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, tasks = address_of(arg), block[PAGES] * block[HEADS] * (source >= 0)
        tokens, dim = block[TOKENS], block[DIM]
        numbers, column = np.empty((tokens, dim), np.float32), np.empty(tokens, np.float32)
        codes, packed = np.empty(tokens * dim, np.uint8), np.empty(tokens * dim, np.uint8)
        scales = np.empty((3, dim), np.float32)
        while True:
            task = fetch_add(ticket, 1)
            if task >= tasks:
                break
            if block[ROUND] == MEASURE:
                _measure_keys(block, task, numbers, scales)
            elif block[ROUND] == WRITE and block[BITS] >= RAW_BF16:
                _write_raw_keys(block, task, numbers, column)
            elif block[ROUND] == WRITE:
                _write_keys(block, task, numbers, codes, packed, scales)
            else:
                if block[BITS] >= RAW_BF16:
                    _read_raw_keys(block, task, numbers, column)
                else:
                    _read_keys(block, task, numbers, codes, packed, scales)
                _copy_out(block, task, numbers)

    return compile_worker(worker, "key pages")


@exact
def pack_keys(block, task, numbers, codes, packed, scales, column):
    """Do both rounds of one page at once: raise the flag, too, if it cannot be stored."""
    _measure_keys(block, task, numbers, scales)
    if block[BITS] >= RAW_BF16:
        _write_raw_keys(block, task, numbers, column)
    else:
        _write_keys(block, task, numbers, codes, packed, scales)


@exact
def _measure_keys(block, task, numbers, scales):
    """Work out the scales of one page; raise the flag if it cannot be stored."""
    tokens, dim, bits = block[TOKENS], block[DIM], block[BITS]
    kind, x, stride = block[KIND], place(block, task), token_stride(block)
    low, high, doubt, row = scales[0], scales[1], scales[2], numbers[0]
    for t in range(tokens):
        read_row(kind, x + t * stride, dim, row)
        if t == 0:
            for d in range(dim):
                low[d], high[d], doubt[d] = row[d], row[d], row[d] - row[d]
        else:
            for d in range(dim):
                low[d] = row[d] if row[d] < low[d] else low[d]
                high[d] = row[d] if row[d] > high[d] else high[d]
                doubt[d] += row[d] - row[d]
    require_finite(block, doubt)
    if bits >= RAW_BF16:
        return
    clip = np.float32(carray(f64_at(block.ctypes.data), (BLOCK_SIZE,))[CLIP])
    for d in range(dim):
        middle = (high[d] + low[d]) / np.float32(2)
        half = (high[d] - low[d]) / np.float32(2) * clip
        low[d] = middle - half
        high[d] = half * np.float32(2) / np.float32((1 << bits) - 1)
    propose_scales(block, task * dim, low, high)


@exact
def _write_keys(block, task, numbers, codes, packed, scales):
    """Write the scales and codes of one page."""
    tokens, dim, bits = block[TOKENS], block[DIM], block[BITS]
    kind, x, stride = block[KIND], place(block, task), token_stride(block)
    page = stored_page(block, task)
    write_scales(block, page * dim, task * dim, scales[0], scales[1])
    invert(scales[1])
    lo, inverse, levels = scales[0].ctypes.data, scales[1].ctypes.data, np.float32((1 << bits) - 1)
    for t in range(tokens):
        row = float_row(kind, x + t * stride, dim, numbers[t])
        quantize_row(1, row, dim, lo, inverse, levels, codes.ctypes.data + t * dim)
    pack_codes(codes.ctypes.data, tokens * dim, bits, packed.ctypes.data)
    row_bytes = tokens * bits // 8
    stored = carray(u8_at(block[CODES] + page * dim * row_bytes), (ANY,))
    for d in range(dim):
        for j in range(row_bytes):
            stored[d * row_bytes + j] = packed[j * dim + d]


@exact
def _read_keys(block, task, numbers, codes, packed, scales):
    """Dequantize one page."""
    tokens, dim, bits = block[TOKENS], block[DIM], block[BITS]
    page, row_bytes = stored_page(block, task), tokens * bits // 8
    stored = carray(u8_at(block[CODES] + page * dim * row_bytes), (ANY,))
    for d in range(dim):
        for j in range(row_bytes):
            packed[j * dim + d] = stored[d * row_bytes + j]
    unpack_codes(packed.ctypes.data, tokens * dim, bits, codes.ctypes.data)
    read_scales(block, page * dim, scales[0], scales[1])
    lo, step = scales[0].ctypes.data, scales[1].ctypes.data
    for t in range(tokens):
        dequantize_row(1, codes.ctypes.data + t * dim, dim, lo, step, numbers[t].ctypes.data)


@exact
def _copy_out(block, task, numbers):
    kind, x, stride = block[KIND], place(block, task), token_stride(block)
    for t in range(block[TOKENS]):
        write_row(kind, x + t * stride, block[DIM], numbers[t])


@exact
def _write_raw_keys(block, task, numbers, column):
    tokens, dim, bits = block[TOKENS], block[DIM], block[BITS]
    kind, x, stride = block[KIND], place(block, task), token_stride(block)
    start = stored_page(block, task) * dim
    for t in range(tokens):
        read_row(kind, x + t * stride, dim, numbers[t])
    for d in range(dim):
        for t in range(tokens):
            column[t] = numbers[t, d]
        write_row(bits, block[CODES] + (start + d) * tokens * item_bytes(bits), tokens, column)


@exact
def _read_raw_keys(block, task, numbers, column):
    tokens, dim, bits = block[TOKENS], block[DIM], block[BITS]
    start = stored_page(block, task) * dim
    for d in range(dim):
        read_row(bits, block[CODES] + (start + d) * tokens * item_bytes(bits), tokens, column)
        for t in range(tokens):
            numbers[t, d] = column[t]
