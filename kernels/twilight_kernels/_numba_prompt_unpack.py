"""Pages as matrix tiles read them, on CPUs: dequantized to bfloat16, neighbours of a sum side by side.

The numbers are those of ``load_key_pages`` and ``load_value_pages`` to the bit, so nothing here is fused or reordered.
A task is one page of one KV head: of sinks, packed, or of the window. Where no token is, values are zero, because a
weight of zero does not undo a NaN; keys may be anything, because nobody reads their logits.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from llvmlite import ir
from numba import carray, literally, types
from numba.extending import intrinsic

from ._numba_ir import F32, I32, LANES, Loop, constant, element, int64, literals, load, splat, store
from ._numba_lanes import unpack_key_page, value_planes
from ._numba_numbers import RAW_BF16, RAW_F16, address_of, exact, fetch_add, i32_at, i64_at, read_row
from ._numba_pool import BLOCK_SIZE, SOURCE_HASH, compile_worker
from ._numba_prompt_block import (
    COLUMNS,
    FIRST_HEAD,
    HEADS,
    KEY_CODES,
    KEY_DIM,
    KEY_LO,
    KEY_STEP,
    KV_HEADS,
    PACKED_BLOCKS,
    PACKED_PAGES,
    PLAIN_KEYS,
    PLAIN_TABLE,
    PLAIN_VALUES,
    ROWS,
    SINK_BLOCKS,
    SINK_PAGES,
    SINKS,
    START,
    TABLE,
    VALUE_CODES,
    VALUE_DIM,
    VALUE_LO,
    VALUE_STEP,
    WINDOW_BLOCKS,
    WINDOW_PAGES,
    WINDOW_START,
    keys_of,
    row_end,
    row_pages,
    values_of,
    wide,
    wide_value,
)
from ._numba_score import bytes_of_channel


@cache
def unpack_worker(key_kind: int, value_kind: int, page_size: int, value_dim: int, group_size: int) -> int:
    source = SOURCE_HASH

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket = address_of(arg)
        plain = block[SINK_PAGES] + block[WINDOW_PAGES]
        tasks = block[HEADS] * (plain + block[PACKED_PAGES]) * (source >= 0)
        numbers = np.zeros((wide(block[KEY_DIM]), page_size), np.float32)
        rows = np.zeros((2, wide_value(value_dim)), np.float32)
        scales = np.zeros((2, max(wide(block[KEY_DIM]), value_dim)), np.float32)
        while True:
            task = fetch_add(ticket, 1)
            if task >= tasks:
                break
            head, page = task % block[HEADS], task // block[HEADS]
            if page < plain:
                _unpack_plain(page_size, value_dim, block, head, page, numbers, rows, scales)
            else:
                _unpack_packed(
                    key_kind, value_kind, page_size, value_dim, group_size, block, head, page - plain, numbers, rows,
                    scales,
                )  # fmt: skip

    name = f"prompt pages, key kind {key_kind}, value kind {value_kind}, page {page_size}, value_dim {value_dim}"
    return compile_worker(worker, name)


@exact
def _unpack_packed(
    key_kind, value_kind, page_size, value_dim, group_size, block, head, index, numbers, rows, scales
):  # fmt: skip
    """Unpack the ``index``-th packed page."""
    literally(key_kind)
    literally(value_kind)
    literally(page_size)
    literally(value_dim)
    literally(group_size)
    slot = np.int64(carray(i32_at(block[TABLE]), (block[PACKED_PAGES],))[index])
    page, key_dim = slot * block[KV_HEADS] + block[FIRST_HEAD] + head, block[KEY_DIM]
    first = COLUMNS * block[SINK_BLOCKS]
    channel_bytes = bytes_of_channel(key_kind, page_size)
    codes = block[KEY_CODES] + page * key_dim * channel_bytes
    unpack_key_page(key_kind, page_size, codes, channel_bytes, key_dim, numbers.ctypes.data)
    if key_kind < RAW_BF16:
        read_row(RAW_F16, block[KEY_LO] + 2 * page * key_dim, key_dim, scales[0])
        read_row(RAW_F16, block[KEY_STEP] + 2 * page * key_dim, key_dim, scales[1])
    else:
        scales[0, :key_dim], scales[1, :key_dim] = 0, 1
    _write_keys(page_size, block, head, first + index * page_size, page_size, numbers, scales)
    groups = (value_dim + group_size - 1) // group_size
    row_bytes = value_dim * value_kind // 8 if value_kind < RAW_BF16 else 2 * value_dim
    scales[0, :groups], scales[1, :groups] = 0, 1
    out = values_of(block, head) + 2 * (first + index * page_size) * wide_value(value_dim)
    for t in range(page_size):
        token = page * page_size + t
        if value_kind < RAW_BF16:
            read_row(RAW_F16, block[VALUE_LO] + 2 * token * groups, groups, scales[0])
            read_row(RAW_F16, block[VALUE_STEP] + 2 * token * groups, groups, scales[1])
        unpack_value_row(
            value_kind, value_dim, group_size, block[VALUE_CODES] + token * row_bytes, scales[0].ctypes.data,
            scales[1].ctypes.data, rows[t % 2].ctypes.data,
        )  # fmt: skip
        if t % 2 == 1:
            _write_pair(rows, out + (t - 1) * 2 * wide_value(value_dim))
    if index == block[PACKED_PAGES] - 1:
        _clear(block, head, first + (index + 1) * page_size, first + COLUMNS * block[PACKED_BLOCKS])


@exact
def _unpack_plain(page_size, value_dim, block, head, index, numbers, rows, scales):
    """Unpack a page of the sinks, or the window's after these."""
    literally(page_size)
    literally(value_dim)
    key_dim, is_sink = block[KEY_DIM], index < block[SINK_PAGES]
    slot = np.int64(carray(i32_at(block[PLAIN_TABLE]), (block[SINK_PAGES] + block[WINDOW_PAGES],))[index])
    if is_sink:
        begin, column, end = np.int64(0), index * page_size, COLUMNS * block[SINK_BLOCKS]
        valid = min(block[SINKS], block[START] + block[ROWS])
    else:
        begin = COLUMNS * (block[SINK_BLOCKS] + block[PACKED_BLOCKS])
        end = begin + COLUMNS * block[WINDOW_BLOCKS]
        column = begin + (row_pages(block, 0) + index - block[SINK_PAGES]) * page_size - COLUMNS * block[WINDOW_START]
        valid = begin + row_end(block, block[ROWS] - 1) - COLUMNS * block[WINDOW_START]
    page, width = slot * block[KV_HEADS] + block[FIRST_HEAD] + head, wide_value(value_dim)
    codes, count = block[PLAIN_KEYS] + 2 * page * key_dim * page_size, min(page_size, valid - column)
    if count > 0:  # else the page may not be there yet
        unpack_key_page(RAW_BF16, page_size, codes, 2 * page_size, key_dim, numbers.ctypes.data)
        scales[0, :key_dim], scales[1, :key_dim] = 0, 1
        _write_keys(page_size, block, head, column, min(page_size, end - column), numbers, scales)
    for t in range((count + 1) // 2 * 2):
        rows[t % 2] = 0
        if t < count:
            read_row(RAW_BF16, block[PLAIN_VALUES] + 2 * (page * page_size + t) * value_dim, value_dim, rows[t % 2])
        if t % 2 == 1:
            _write_pair(rows, values_of(block, head) + 2 * (column + t - 1) * width)
    if is_sink:
        is_first, is_last = index == 0, index == block[SINK_PAGES] - 1
    else:
        is_first, is_last = index == block[SINK_PAGES], index == block[SINK_PAGES] + block[WINDOW_PAGES] - 1
    if is_first:
        _clear(block, head, begin, column)
    if is_last:
        _clear(block, head, column + (count + 1) // 2 * 2, end)


@exact
def _write_keys(page_size, block, head, column, count, numbers, scales):
    """Write the channel-major numbers of a page, scaled, to the columns from ``column`` on."""
    run, pairs = min(page_size, COLUMNS), wide(block[KEY_DIM]) // 2
    lo, step = scales[0], scales[1]
    for start in range(0, count, run):
        at = column + start
        out = keys_of(block, head) + 4 * (at // COLUMNS * pairs * COLUMNS + at % COLUMNS)
        for i in range(pairs):
            write_pairs(
                numbers[2 * i].ctypes.data + 4 * start, numbers[2 * i + 1].ctypes.data + 4 * start,
                min(run, count - start + LANES - 1) // LANES, step[2 * i], lo[2 * i], step[2 * i + 1], lo[2 * i + 1],
                out + 4 * COLUMNS * i,
            )  # fmt: skip


@exact
def _write_pair(rows, out):
    """Write two value rows side by side."""
    one, none = np.float32(1), np.float32(0)
    write_pairs(rows[0].ctypes.data, rows[1].ctypes.data, rows.shape[1] // LANES, one, none, one, none, out)


@exact
def _clear(block, head, first, last):
    """Zero the values of columns ``first .. last``, even numbers."""
    width = wide_value(block[VALUE_DIM])
    words = (last - first) * width // 4
    out = carray(i64_at(values_of(block, head) + 2 * first * width), (max(0, words),))
    out[:] = 0


@intrinsic
def write_pairs(typingctx, a, b, vectors, a_step, a_lo, b_step, b_lo, out):
    """Write ``a * a_step + a_lo`` and likewise of ``b``, ``16 * vectors`` float32 each, as bfloat16 side by side."""

    def codegen(context, builder, _signature, args):
        a, b, vectors, a_step, a_lo, b_step, b_lo, out = args
        loop = Loop(builder, vectors, [])
        found = []
        for row, step, lo in ((a, a_step, a_lo), (b, b_step, b_lo)):
            x = load(builder, element(builder, row, loop.index, 4 * LANES), ir.VectorType(F32, LANES), 4)
            found.append(builder.fadd(splat(builder, lo), builder.fmul(x, splat(builder, step))))
        store(builder, _pairs(builder, *found), element(builder, out, loop.index, 4 * LANES))
        loop.close([])
        return context.get_dummy_value()

    number = types.float32
    return types.void(types.int64, types.int64, types.int64, number, number, number, number, types.int64), codegen


@intrinsic
def unpack_value_row(typingctx, kind, value_dim, group_size, codes, lo, step, out):
    """Write one value row as float32 ``lo + code * step``.

    Literals: ``kind``, ``value_dim``, ``group_size``. Addresses: ``codes``; ``lo`` and ``step`` float32 of each group;
    ``out``.
    """
    kind_, dim, group = literals(kind, value_dim, group_size)
    signature = types.void(kind, value_dim, group_size, *(types.int64,) * 4)

    def codegen(context, builder, _signature, args):
        codes, lo, step, out = args[3:]
        for index, plane in enumerate(value_planes(kind_, dim, group)):
            for start in range(0, plane.row_size, plane.lanes):
                columns = plane.load(builder, builder.add(codes, int64(plane.start + start * plane.item_bytes)), start)
                for f in range(plane.fields):
                    channel = plane.channel(f, start)
                    place = builder.add(out, int64(4 * channel))
                    base = splat(builder, load(builder, builder.add(lo, int64(channel // group * 4)), F32), plane.lanes)
                    if index:
                        base = load(builder, place, ir.VectorType(F32, plane.lanes), 4)
                    scale = splat(
                        builder, load(builder, builder.add(step, int64(channel // group * 4)), F32), plane.lanes
                    )
                    number = builder.fmul(columns[f], constant(plane.field_weight(f), plane.lanes))
                    store(builder, builder.fadd(base, builder.fmul(number, scale)), place)
        return context.get_dummy_value()

    return signature, codegen


def _pairs(builder, even, odd):
    """Two vectors, rounded to bfloat16 as ``write_row`` does, in the halves of one."""
    bits = ir.VectorType(I32, LANES)
    high, found = constant(-65536, LANES, I32), []
    for x in (even, odd):
        x = builder.bitcast(x, bits)
        last = builder.and_(builder.lshr(x, constant(16, LANES, I32)), constant(1, LANES, I32))
        found.append(builder.add(builder.add(x, constant(0x7FFF, LANES, I32)), last))
    low = builder.lshr(found[0], constant(16, LANES, I32))
    return builder.or_(low, builder.and_(found[1], high))
