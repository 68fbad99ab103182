"""Logits of whole pages of packed keys on a GPU: a warp takes a page and reads its words once.

Tensor cores multiply tiles of 16 tokens with 8 columns. The columns are the query heads of a KV head, each twice: the
float16 numbers nearest to the query, times the page's steps, and what rounding left of them. So four heads fill a tile,
and the two products that make a logit end up in one thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import QUERY, exact_unit, product
from ._triton_words import (
    CODE,
    code_rows,
    heads_of,
    join_tiles,
    load_halves,
    load_rests,
    nibble_words,
    repeated,
    rounding_of_product,
)

LARGEST_UNIT = tl.constexpr(32768.0)  # whose inverse float16 holds
LOW_ROWS = tl.constexpr(16)  # as many as a tile of tensor cores has; all of them the same


@triton.jit
def query_columns(q, is_rest, IS_WIDE: tl.constexpr):
    """Scaled query heads ``[M, C]`` (see ``load_query``) for both of their columns, ``[1, C, M, 2]``.

    Float16 holds them exactly where the model's numbers have 16 bits; those of 32 stay as they are, ``[1, C, M, 1]``.
    """
    columns = tl.trans(q)[None, :, :, None]
    if IS_WIDE:
        return columns
    else:
        one = tl.full([1, 1, 1, 1], 1.0, tl.float16)
        return rounding_of_product(columns.to(tl.float16), one, one, is_rest * 0.0)


@triton.jit
def exact_columns(columns, is_rest):
    """Columns that multiply numbers which no step belongs to, ``[1, C, 2 * M]``."""
    one = tl.full([1, columns.shape[1]], 1.0, tl.float16)
    return folded(columns, one, tl.full([1], 1.0, tl.float32), is_rest)


@triton.jit
def load_patterns(place, BITS: tl.constexpr, PAGE: tl.constexpr):
    """Which of the two columns of a head is what rounding left, and for three bits ``nibble_words``' half."""
    is_rest = load_rests(place)
    if BITS == 3:
        return is_rest, load_halves(place, PAGE // 8)
    else:
        return is_rest, is_rest


@triton.jit
def score_columns(
    q, low_q, patterns, q_unit, codes, lows, steps, page_head, exists, D: tl.constexpr, DP: tl.constexpr,
    PAGE: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Logits of pages ``page_head [L]`` of one KV head; ``-inf`` where there is none (see ``column_logits``)."""
    places, widths, bias = (), (), tl.zeros([LANES, LOW_ROWS, low_q[0].shape[2]], tl.float32)
    for k in tl.static_range(len(q)):
        d = k * DP + tl.arange(0, q[k].shape[1])
        mask = exists[:, None] & (d < D)[None, :]
        channel = page_head[:, None] * D + d[None, :]
        places = places + ((channel, mask),)
        widths = widths + (tl.load(steps + channel, mask=mask, other=0.0),)
        low = tl.load(lows + channel, mask=mask, other=0.0)
        rows = tl.broadcast_to(low[:, None, :], (LANES, LOW_ROWS, low.shape[1]))
        bias = product(rows, tl.broadcast_to(low_q[k], (LANES, low.shape[1], low_q[k].shape[2])), bias)
    bias = tl.max(heads_of(bias), 1) * (1 / QUERY)  # of equal rows any
    return column_logits(codes, places, q, patterns, widths, bias, q_unit, exists, PAGE, BITS, T, LANES)


@triton.jit
def column_logits(
    codes, places, q, patterns, steps, bias, q_unit, exists, PAGE: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Logits of the tokens of pages: a tuple of tiles ``[L, M, T]``, in order; ``-inf`` of what does not exist.

    Args:
        codes, places: pages, and for each part of the channels the rows ``[L, C]`` of them, and which are to be read.
        q: ``[1, C, M, 2]`` of each part, see ``query_columns``.
        patterns: see ``load_patterns``.
        steps: ``[L, C]`` of each part.
        bias: ``[L, M]`` what the rows' least numbers, and channels that are not read, add.
        q_unit: ``[M]`` what logits are multiplied by.
        exists: ``[L]`` which pages there are.
    """
    largest = tl.max(steps[0].to(tl.float32), 1)
    for k in tl.static_range(1, len(steps)):
        largest = tl.maximum(largest, tl.max(steps[k].to(tl.float32), 1))
    unit, inverse = exact_unit(tl.minimum(tl.maximum(largest, 1 / LARGEST_UNIT), LARGEST_UNIT))
    field: tl.constexpr = 2 if BITS == 3 else BITS
    columns: tl.constexpr = PAGE * field // 16
    query, words, odd_words = (), (), ()
    for k in tl.static_range(len(places)):
        even, odd = load_words(codes, places[k], patterns[1], PAGE, BITS, columns)
        query = query + (folded(q[k], steps[k], inverse, patterns[0]),)
        words, odd_words = words + (even,), odd_words + (odd,)
    scale = (unit * (CODE / QUERY))[:, None] * q_unit[None, :]
    bias = tl.where(exists[:, None], bias * q_unit[None, :], float("-inf"))
    width: tl.constexpr = 4 if BITS == 3 else BITS
    tiles = ()
    for k in tl.static_range(8 // width):
        tiles = tiles + (code_logits(query, words, scale, bias, k * width, BITS),)
        if BITS == 3:
            tiles = tiles + (code_logits(query, odd_words, scale, bias, k * width, BITS),)
    if 2 * columns < T:
        tiles = (join_tiles(tiles, LANES, q_unit.shape[0], T, 8 // field),)
    return tiles


@triton.jit
def folded(q, steps, inverse, is_rest):
    """Products of the query ``[1, C, M, 2]`` with steps ``[L, C]`` times ``inverse [L]``, ``[L, C, 2 * M]``.

    Of the two columns of a head one holds the nearest float16 numbers, the other what rounding left of them.
    """
    if q.dtype == tl.float32:
        whole = q * (steps.to(tl.float32) * inverse[:, None])[:, :, None, None]
        high = whole.to(tl.float16)
        parts = tl.where(is_rest == 0.0, high, (whole - high.to(tl.float32)).to(tl.float16))
    else:
        unit = inverse.to(tl.float16)[:, None, None, None]
        parts = rounding_of_product(q, steps[:, :, None, None], unit, is_rest)
    return parts.reshape(parts.shape[0], parts.shape[1], 2 * q.shape[2])


@triton.jit
def load_words(codes, place, is_first, PAGE: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Words of codes ``[L, C, COLUMNS]``; of three bits those of the even planes, and of the odd ones."""
    channel, mask = place
    row = codes.to(tl.pointer_type(tl.uint16), bitcast=True) + (channel * (PAGE * BITS // 16))[:, :, None]
    column = tl.arange(0, COLUMNS)[None, None, :]
    words = tl.load(row + column, mask=mask[:, :, None], other=0)
    if BITS == 3:
        highs = tl.load(row + COLUMNS + tl.arange(0, COLUMNS // 2)[None, None, :], mask=mask[:, :, None], other=0)
        return nibble_words(words, repeated(highs), is_first)
    else:
        return words, words


@triton.jit
def code_logits(query, words, scale, bias, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """Logits ``[L, M, 2 * COLUMNS]`` of the codes at bit ``SHIFT`` of the bytes of words ``[L, C, COLUMNS]``."""
    lanes: tl.constexpr = words[0].shape[0]
    columns: tl.constexpr = words[0].shape[2]
    found = tl.zeros([lanes, 2 * columns, query[0].shape[2]], tl.float32)
    for k in tl.static_range(len(words)):
        found = product(code_rows(words[k], SHIFT, BITS), query[k], found)
    logits = heads_of(found).reshape(lanes, 2, columns, scale.shape[1])
    tokens = tl.permute(logits, (0, 3, 2, 1)).reshape(lanes, scale.shape[1], 2 * columns)
    return tl.fma(tokens, (scale * (1.0 / (1 << SHIFT)))[:, :, None], bias[:, :, None])
