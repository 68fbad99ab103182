"""The tokens of a prompt on CPUs: may they be packed, and one call that puts a row's where they belong.

A task of ``store_tokens`` is one page of the keys or of the values of one KV head, or the plain tokens of one.
"""

from __future__ import annotations

import ctypes
import math
import struct
from functools import cache

import numpy as np
from numba import carray
from torch import Tensor

from ._numba_block import kind_of, last_contiguous
from ._numba_key_pages import pack_keys
from ._numba_numbers import (
    ANY,
    RAW_F16,
    RAW_F32,
    RAW_KIND,
    address_of,
    exact,
    fetch_add,
    fetch_max,
    i64_at,
    item_bytes,
    u16_at,
    u32_at,
)
from ._numba_page_block import (
    BITS,
    CLIP,
    DIM,
    GROUP_SIZE,
    GROUPS,
    HEADS,
    IS_BAD,
    KIND,
    NEW_STEP,
    PAGES,
    STEP,
    TOKENS,
    X_HEAD,
    X_TOKEN,
    X,
)
from ._numba_pool import BLOCK_SIZE, SOURCE_HASH, compile_worker, run, scratch
from ._numba_value_pages import pack_values
from ._reference_codec import not_finite
from .layout import KeyPages, PlainTokens, ValuePages

_PART = 1 << 14  # numbers that one task of `largest_magnitudes` looks at
_FLAT, _COUNT, _FOUND, _KIND = 2, 4, 6, 8  # of the block of `largest_magnitudes`; all but the last are two
_MAGNITUDES = struct.Struct("=9q")
# the rest of the block of values is about plain tokens: addresses, columns, sinks, tokens, first token after the pages
PLAIN_KEYS, PLAIN_VALUES, CAPACITY, SINKS, LENGTH, REST = range(32, 38)


def largest_magnitudes(keys: Tensor, values: Tensor) -> tuple[float, float]:
    """See ``_reference.largest_magnitudes``."""
    keys, values = _dense(keys), _dense(values)
    counts, kind = (keys.numel(), values.numel()), RAW_KIND[keys.dtype]
    block = ctypes.create_string_buffer(
        _MAGNITUDES.pack(0, 0, keys.data_ptr(), values.data_ptr(), *counts, 0, 0, kind), _MAGNITUDES.size
    )
    run(_magnitude_worker(), ctypes.addressof(block), sum(-(-count // _PART) for count in counts))
    key, value = _MAGNITUDES.unpack(block)[_FOUND:_KIND]
    return _number(kind, key), _number(kind, value)


def store_tokens(
    key_pages: KeyPages,
    value_pages: ValuePages,
    plain: PlainTokens,
    page_ids: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    row: int,
    num_sinks: int,
) -> None:
    """See ``_reference.store_tokens``."""
    keys, values = last_contiguous(keys), last_contiguous(values)
    page_ids = page_ids.contiguous()
    blocks = np.zeros((2, BLOCK_SIZE), np.int64)
    pages, heads = len(page_ids), keys.shape[0]
    rest = min(keys.shape[1], num_sinks + pages * key_pages.codec.page_size)
    both: tuple[KeyPages | ValuePages, ...] = key_pages, value_pages
    sizes = [2 * pages * math.prod(stored.lo.shape[1:]) for stored in both]  # of float16 scales
    room = scratch(2 * sum(sizes))
    for block, stored, x, size in zip(blocks, both, (keys, values), sizes):
        item, by_head, by_token = x.element_size(), x.stride(0), x.stride(1)
        block[PAGES : DIM + 1] = pages, heads, stored.codec.page_size, x.shape[2]
        block[BITS : STEP + 1] = (
            kind_of(stored), RAW_KIND[x.dtype], page_ids.data_ptr(), stored.codes.data_ptr(), stored.lo.data_ptr(),
            stored.step.data_ptr(),
        )  # fmt: skip
        block[X : NEW_STEP + 1] = (
            x.data_ptr() + item * num_sinks * by_token, by_token * stored.codec.page_size, by_head, by_token,
            room, room + size,
        )  # fmt: skip
        room += 2 * size
    blocks[0].view(np.float64)[CLIP] = key_pages.codec.clip
    blocks[1, GROUPS : GROUP_SIZE + 1] = value_pages.codec.groups(values.shape[2]), value_pages.codec.group_size
    item = keys.element_size()
    start = row * heads * plain.capacity * item
    blocks[1, PLAIN_KEYS : REST + 1] = (
        plain.keys.data_ptr() + start * keys.shape[2], plain.values.data_ptr() + start * values.shape[2],
        plain.capacity, num_sinks, keys.shape[1], rest,
    )  # fmt: skip
    run(_token_worker(), blocks.ctypes.data, (2 * pages + 1) * heads)
    for block, what in zip(blocks, ("keys", "values")):
        if block[IS_BAD]:
            raise not_finite(what)


def _dense(x: Tensor) -> Tensor:
    """``[B, K, T, D]`` whose numbers fill one run of memory, in whatever order."""
    (_, heads, tokens, dim), strides = x.shape, x.stride()
    is_as_models_have_it = strides == (tokens * heads * dim, dim, heads * dim, 1)
    return x if is_as_models_have_it else x.contiguous()


def _number(kind: int, bits: int) -> float:
    if kind == RAW_F16:
        return float(struct.unpack("<e", struct.pack("<H", bits))[0])
    return float(struct.unpack("<f", struct.pack("<I", bits if kind == RAW_F32 else bits << 16))[0])


@cache
def _magnitude_worker() -> int:
    source = SOURCE_HASH

    def worker(arg):
        block = carray(arg, (16,))
        ticket = address_of(arg)
        first = (block[_COUNT] + _PART - 1) // _PART
        tasks = (first + (block[_COUNT + 1] + _PART - 1) // _PART) * (source >= 0)
        task = fetch_add(ticket, 1)
        while task < tasks:
            which = np.int64(task >= first)
            start = (task - which * first) * _PART
            count = min(_PART, block[_COUNT + which] - start)
            address = block[_FLAT + which] + item_bytes(block[_KIND]) * start
            fetch_max(ticket + 8 * (_FOUND + which), _largest_bits(block[_KIND], address, count))
            task = fetch_add(ticket, 1)

    return compile_worker(worker, "largest magnitudes")


@exact
def _largest_bits(kind, address, count):
    """The largest of raw numbers without their signs, as an integer: they are ordered alike, and NaN is above all."""
    if kind == RAW_F32:
        words, most = carray(u32_at(address), (count,)), np.uint32(0)
        for i in range(count):
            most = max(most, words[i] & np.uint32(0x7FFFFFFF))
        return np.int64(most)
    halves, largest = carray(u16_at(address), (count,)), np.uint16(0)
    for i in range(count):
        largest = max(largest, np.uint16(halves[i] & np.uint16(0x7FFF)))
    return np.int64(largest)


@cache
def _token_worker() -> int:
    source = SOURCE_HASH

    def worker(arg):
        keys = carray(arg, (BLOCK_SIZE,))
        ticket = address_of(arg)
        values = carray(i64_at(ticket + 8 * BLOCK_SIZE), (BLOCK_SIZE,))
        per = keys[PAGES] * keys[HEADS] * (source >= 0)
        tokens, dim = keys[TOKENS], max(keys[DIM], values[DIM])
        numbers, codes = np.empty((tokens, dim), np.float32), np.empty(tokens * dim, np.uint8)
        packed, column = np.empty(tokens * dim, np.uint8), np.empty(tokens, np.float32)
        scales = np.empty((3, keys[DIM]), np.float32)
        value_scales = np.empty((3, tokens * values[GROUPS]), np.float32)
        task = fetch_add(ticket, 1)
        while task < 2 * per + keys[HEADS]:
            if task < per:
                pack_keys(keys, task, numbers, codes, packed, scales, column)
            elif task < 2 * per:
                pack_values(values, task - per, numbers[0, : values[DIM]], codes, value_scales)
            else:
                _keep_plain(keys, values, task - 2 * per)
            task = fetch_add(ticket, 1)

    return compile_worker(worker, "tokens of prompts")


@exact
def _keep_plain(keys, values, head):
    """Copy the sinks and the tokens behind the pages of one KV head to its plain columns, keys channel-major."""
    capacity, dim, sinks, rest = values[CAPACITY], keys[DIM], values[SINKS], values[REST]
    item, value_dim = item_bytes(keys[KIND]), values[DIM]
    halves = item // 2  # of two bytes
    to_keys = carray(u16_at(values[PLAIN_KEYS] + head * dim * capacity * item), (ANY,))
    to_values = carray(u16_at(values[PLAIN_VALUES] + head * capacity * value_dim * item), (ANY,))
    for token in range(values[LENGTH]):
        if sinks <= token < rest:
            continue
        column = token if token < sinks else token - rest + sinks
        at = token - sinks  # pages begin behind the sinks
        key = carray(u16_at(keys[X] + item * (head * keys[X_HEAD] + at * keys[X_TOKEN])), (ANY,))
        for d in range(dim):
            for n in range(halves):
                to_keys[(d * capacity + column) * halves + n] = key[d * halves + n]
        value = carray(u16_at(values[X] + item * (head * values[X_HEAD] + at * values[X_TOKEN])), (ANY,))
        for d in range(value_dim * halves):
            to_values[column * value_dim * halves + d] = value[d]
