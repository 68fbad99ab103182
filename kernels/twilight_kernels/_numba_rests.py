"""Which key channels of a page range widest, and their rests, on CPUs, bit for bit as ``_reference`` has them.

A task is one page of one KV head.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ._numba_block import last_contiguous
from ._numba_numbers import (
    ANY,
    RAW_KIND,
    address_of,
    exact,
    f64_at,
    fetch_add,
    float_to_half,
    half_to_float,
    i64_at,
    item_bytes,
    read_number,
    read_row,
    write_number,
)
from ._numba_page_block import BITS, CLIP, DIM, HEADS, KIND, PAGES, TOKENS, X_PAGE, X_TOKEN, X, place, token_stride
from ._numba_pool import BLOCK_SIZE, SOURCE_HASH, compile_worker, run
from ._numba_rows import dequantize_row, quantize_row, range_of_row
from .page_codec import KeyCodec

X_CHANNEL, COUNT, INDEX, INDEX_PAGE, INDEX_HEAD, TURNS = range(23, 29)  # a count, addresses, strides in numbers


def widest_channels(keys: Tensor, count: int) -> Tensor:
    """See ``_reference.widest_channels``."""
    keys = last_contiguous(keys)
    out = torch.empty(*keys.shape[:2], count, dtype=torch.int64)
    block = _block(keys, out)
    run(_widest_worker(), block.ctypes.data, keys.shape[0] * keys.shape[1])
    return out


def write_rests(keys: Tensor, index: Tensor, codec: KeyCodec, turns: Tensor | None = None) -> None:
    """See ``_reference.write_rests``."""
    index = last_contiguous(index)
    block = _block(keys, index)
    block[BITS], block.view(np.float64)[CLIP] = codec.bits, codec.clip
    if turns is not None:
        turns = turns.contiguous()
        block[TURNS] = turns.data_ptr()
    run(_rest_worker(), block.ctypes.data, keys.shape[0] * keys.shape[1])


def _block(keys: Tensor, index: Tensor) -> np.ndarray:
    block = np.zeros(BLOCK_SIZE, np.int64)
    block[PAGES : DIM + 1] = keys.shape
    block[KIND], block[X], block[X_PAGE : X_TOKEN + 1] = RAW_KIND[keys.dtype], keys.data_ptr(), keys.stride()[:3]
    block[X_CHANNEL : INDEX_HEAD + 1] = keys.stride(3), index.shape[2], index.data_ptr(), *index.stride()[:2]
    return block


@cache
def _widest_worker() -> int:
    source = SOURCE_HASH

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, tasks = address_of(arg), block[PAGES] * block[HEADS] * (source >= 0)
        row, ranges = np.empty(block[DIM], np.float32), np.empty((2, block[DIM]), np.float32)
        task = fetch_add(ticket, 1)
        while task < tasks:
            _find_widest(block, task, row, ranges)
            task = fetch_add(ticket, 1)

    return compile_worker(worker, "widest key channels")


@exact
def _find_widest(block, task, row, ranges):
    dim, low, high = block[DIM], ranges[0], ranges[1]
    for t in range(block[TOKENS]):
        read_row(block[KIND], place(block, task) + t * token_stride(block), dim, row)
        if t == 0:
            low[:] = row
            high[:] = row
        for d in range(dim):
            low[d] = row[d] if row[d] < low[d] else low[d]
            high[d] = row[d] if row[d] > high[d] else high[d]
    for d in range(dim):
        high[d] -= low[d]
    index = _index_of(block, task)
    for r in range(block[COUNT]):
        widest = 0
        for d in range(1, dim):
            widest = d if high[d] > high[widest] else widest
        index[r] = widest
        high[widest] = -1


@cache
def _rest_worker() -> int:
    source = SOURCE_HASH

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, tasks = address_of(arg), block[PAGES] * block[HEADS] * (source >= 0)
        left, held = np.empty(block[TOKENS], np.float32), np.empty(block[TOKENS], np.float32)
        codes, scales = np.empty(block[TOKENS], np.uint8), np.empty(3, np.float32)
        task = fetch_add(ticket, 1)
        while task < tasks:
            for r in range(block[COUNT]):
                _write_rest(block, task, r, left, held, codes, scales)
            task = fetch_add(ticket, 1)

    return compile_worker(worker, "rests of key channels")


@exact
def _write_rest(block, task, r, left, held, codes, scales):
    kind, tokens, stride = block[KIND], block[TOKENS], token_stride(block)
    page, channel_stride = place(block, task), block[X_CHANNEL] * item_bytes(kind)
    source = page + _index_of(block, task)[r] * channel_stride
    target = page + (block[DIM] - block[COUNT] + r) * channel_stride
    for t in range(tokens):
        left[t] = read_number(kind, source + t * stride, 0)
    turn = np.int64(0)
    if block[TURNS] != 0:
        turn = carray(i64_at(block[TURNS]), (ANY,))[task % block[HEADS] * block[COUNT] + r]
    for _ in range(turn + 1):
        _round(block, left, held, codes, scales)
        for t in range(tokens):
            left[t] -= held[t]
    for t in range(tokens):
        write_number(kind, target + t * stride, 0, left[t])


@exact
def _round(block, left, held, codes, scales):
    """Work out what a page would hold of one channel."""
    bits, tokens = block[BITS], block[TOKENS]
    if bits >= 16:
        held[:] = left
        return
    levels, clip = np.float32((1 << bits) - 1), np.float32(_clip(block))
    range_of_row(left.ctypes.data, tokens, scales.ctypes.data)
    middle, half = (scales[1] + scales[0]) / np.float32(2), (scales[1] - scales[0]) / np.float32(2) * clip
    scales[0] = half_to_float(float_to_half(middle - half))
    scales[1] = half_to_float(float_to_half(half * np.float32(2) / levels))
    scales[2] = np.float32(1) / scales[1] if scales[1] > 0 else np.float32(0)
    lo = scales.ctypes.data
    quantize_row(0, left.ctypes.data, tokens, lo, lo + 8, levels, codes.ctypes.data)
    dequantize_row(0, codes.ctypes.data, tokens, lo, lo + 4, held.ctypes.data)


@exact
def _clip(block):
    return carray(f64_at(block.ctypes.data), (BLOCK_SIZE,))[CLIP]


@exact
def _index_of(block, task):
    page, head = task // block[HEADS], task % block[HEADS]
    first = block[INDEX] + 8 * (page * block[INDEX_PAGE] + head * block[INDEX_HEAD])
    return carray(i64_at(first), (ANY,))
