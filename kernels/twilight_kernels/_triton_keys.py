"""Logits of packed pages on a GPU, from their codes as they are.

Whole words of packed codes are read once, and codes are neither shifted nor converted nor scaled: a code's bits, left
where they are, are a float16 number below the normal ones, which tensor cores multiply exactly. Powers of two and the
channels' steps are folded into the query, and into what comes out. One warp takes one page. Of codes of three bits the
third comes from a plane of its own. Raw keys, and codes of pages too large for registers, which are unpacked, are read
in parts by all warps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import (
    CODE,
    FEW_REGISTERS,
    QUERY,
    REGISTERS,
    channel_parts,
    exact_unit,
    field_bits,
    join_tiles,
    masked,
    nibble_words,
    odd_bytes,
    power_of_two,
    product,
    stack,
    stacked_product,
    tile_tokens,
    unpack_codes,
)

WARPS = tl.constexpr(4)
LOW_COLUMNS = tl.constexpr(8)  # as many as a tile of tensor cores has; all of them the same
_WORDS = 2048  # of a page, as many as a warp has registers for: 64 tokens of 128 channels, four bits each


def score_shape(page_size: int, dim: int, bits: int, per_kv: int) -> dict[str, int]:
    """Constants of the kernels that score pages: four at once; of raw and of the largest ones a part of one."""
    heads, plane = power_of_two(per_kv), page_size * field_bits(bits) // 8  # tokens that lie side by side in a plane
    channels = channel_parts(dim)
    main = channels["DP"]
    is_whole = bits != 16 and _words(page_size, main, bits) <= 2 * _WORDS and main <= 128 and heads <= 8
    if bits == 3:  # elsewhere its two planes do not fit beside the query
        is_whole = heads <= 8 and main <= dim and page_size >= 64 and page_size * main <= 64 * 128
    tokens = plane if plane >= 16 else page_size
    if not is_whole:
        tokens = min(page_size, tile_tokens(main) // (2 if bits == 16 else 1))
    return {
        "PAGE": page_size, "BITS": bits, **channels, "PER_KV": per_kv, "M": max(8, heads),
        "LANES": 4 if is_whole else 1, "T": tokens,
    }  # fmt: skip


def logits_launch(shape: dict[str, int], has_tokens: bool) -> dict[str, int]:
    """How to launch ``logits_kernel``: ``score_launch``, with few registers where they are enough for it."""
    is_small = shape["LANES"] > 1 and _words(shape["PAGE"], shape["DP"], shape["BITS"]) <= _WORDS // 2
    registers = {"maxnreg": FEW_REGISTERS} if is_small and not has_tokens else {}
    return {**score_launch(shape, has_tokens), **registers}


def score_launch(shape: dict[str, int], has_tokens: bool = False) -> dict[str, int]:
    """How to launch a kernel of ``score_shape``: a warp takes a page, or two where one has not enough registers."""
    is_whole, words = shape["LANES"] > 1, _words(shape["PAGE"], shape["DP"], shape["BITS"])
    if has_tokens and shape["BITS"] == 3 and not shape["RP"]:  # their flags are more than fits beside both planes
        words += 1
    is_large = words > _WORDS if is_whole else shape["M"] * shape["DP"] > 2048
    return {"num_warps": 8 if is_large else 4, "num_stages": 1 if is_whole else 2, "maxnreg": REGISTERS}


def _words(page_size: int, channels: int, bits: int) -> int:
    """Words of a page in registers; codes of three bits are made to nibbles."""
    return page_size * channels * (4 if bits == 3 else bits) // 16


@triton.jit
def score_pages(
    q, q_unit, codes, lows, steps, page_head, exists, offset, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PAGE: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Logits of pages ``page_head [L]`` of one KV head, where they exist; see ``page_logits``."""
    places, widths = (), ()
    bias = tl.zeros([LANES, M], tl.float32)
    for k in tl.static_range(len(q)):
        d = k * DP + tl.arange(0, q[k].shape[1])
        mask = exists[:, None] & (d < D)[None, :]
        channel = page_head[:, None] * D + d[None, :]
        places = places + ((channel, mask),)
        if BITS != 16:
            widths = widths + (tl.load(steps + channel, mask=mask, other=0.0).to(tl.float32),)
            bias += low_products(q[k], tl.load(lows + channel, mask=mask, other=0.0))
    if BITS == 16:
        highs, rests, unit = q, q, tl.zeros([LANES], tl.float32)
    else:
        highs, rests, unit = fold_steps(q, widths)
    return page_logits(codes, places, offset, highs, rests, unit, bias, q_unit, M, PAGE, BITS, T, LANES)


@triton.jit
def low_products(q, low):
    """What the least numbers ``low [L, C]`` of pages' channels add to the logits of ``q [M, C]``, ``[L, M]``."""
    if low.shape[0] == 1:  # all warps share a page, and the work
        return tl.sum(q[None, :, :] * low.to(tl.float32)[:, None, :], 2) * (1 / QUERY)
    else:
        high, rest = halves(tl.broadcast_to(q[None, :, :], (low.shape[0], q.shape[0], q.shape[1])))
        columns = tl.broadcast_to(low[:, :, None], (low.shape[0], low.shape[1], LOW_COLUMNS))
        return tl.max(stacked_product(stack(high, rest), columns), 2) * (1 / QUERY)  # of equal columns any


@triton.jit
def fold_steps(q, steps):
    """Fold steps ``[L, C]`` of channels into the query ``[M, C]``: two float16 parts ``[L, M, C]``, and their unit.

    All but the unit are tuples, of the parts of the channels.
    """
    largest = tl.max(steps[0], 1)
    for k in tl.static_range(1, len(q)):
        largest = tl.maximum(largest, tl.max(steps[k], 1))
    unit, inverse = exact_unit(largest)
    highs, rests = (), ()
    for k in tl.static_range(len(q)):
        high, rest = halves(q[k][None, :, :] * (steps[k] * inverse[:, None])[:, None, :])
        highs, rests = highs + (high,), rests + (rest,)
    return highs, rests, unit * (1 / QUERY)


@triton.jit
def halves(x):
    """Two float16 numbers whose sum is ``x``, but for rounding of 22 bits."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def page_logits(
    codes, places, offset, high, rest, unit, bias, q_unit, M: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr,
    T: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Logits of the tokens of pages: a tuple of tiles ``[L, M, T]`` in order; of a single page one, from ``offset`` on.

    Args:
        codes, places: pages, and for each part of the channels the rows ``[L, C]`` of them, and which are to be read.
        high, rest, unit: the query, with the rows' steps (see ``fold_steps``); raw keys have none.
        bias: ``[L, M]`` what the rows' least numbers, and channels that are not read, add.
        q_unit: ``[M]`` what logits are multiplied by.
    """
    tiles = ()
    if LANES == 1:
        found = tl.zeros([M, T], tl.float32)
        for k in tl.static_range(len(places)):
            found += token_products(codes, places[k], offset, high[k], rest[k], PAGE, BITS, T)
        found = found.reshape(LANES, M, T)
        if BITS != 16:
            found *= (unit * CODE)[:, None, None]
        tiles = ((found + bias[:, :, None]) * q_unit[None, :, None],)
    else:
        field: tl.constexpr = 2 if BITS == 3 else BITS
        columns: tl.constexpr = PAGE * field // 16
        stacked, words, odd_words = (), (), ()
        for k in tl.static_range(len(places)):
            even, odd = load_words(codes, places[k], PAGE, BITS, columns)
            stacked, words, odd_words = stacked + (stack(high[k], rest[k]),), words + (even,), odd_words + (odd,)
        found = word_products(stacked, words, odd_words, unit * CODE, BITS, LANES, M, columns)
        for k in tl.static_range(8 // field):
            tiles = tiles + ((found[k] + bias[:, :, None]) * q_unit[None, :, None],)
        if 2 * columns < T:
            tiles = (join_tiles(tiles, LANES, M, T, 8 // field),)
    return tiles


@triton.jit
def token_products(codes, place, offset, high, rest, PAGE: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr):
    """Products with raw keys, or with codes, of tokens of one page from ``offset`` on, ``[M, T]``.

    Each warp takes a share of the channels, so that none holds the whole query.
    """
    channel, mask = place
    M: tl.constexpr = high.shape[len(high.shape) - 2]
    C: tl.constexpr = channel.shape[1]
    W: tl.constexpr = WARPS if C >= 16 * WARPS else 1
    row, is_real = channel.reshape(W, C // W)[:, :, None], mask.reshape(W, C // W)[:, :, None]
    t = (offset + tl.arange(0, T))[None, None, :]
    if BITS == 16:
        keys = tl.load(codes + row * PAGE + t, mask=is_real, other=0.0)
        return tl.sum(product(shares(high, M, W), keys), 0)
    else:
        bits = unpack_codes(codes + row * (PAGE * BITS // 8), t, PAGE, BITS, is_real).to(tl.uint16)
        keys = bits.to(tl.float16, bitcast=True)
        return tl.sum(product(shares(rest, M, W), keys) + product(shares(high, M, W), keys), 0)


@triton.jit
def shares(q, M: tl.constexpr, W: tl.constexpr):
    """The channels of one query ``[M, C]``, or ``[1, M, C]``, in shares ``[W, M, C / W]``."""
    return tl.permute(q.reshape(M, W, q.numel // (M * W)), (1, 0, 2))


@triton.jit
def load_words(codes, place, PAGE: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Words of codes ``[L, C, COLUMNS]``; of three bits those of the even planes, and of the odd ones."""
    channel, mask = place
    row = codes.to(tl.pointer_type(tl.uint16), bitcast=True) + (channel * (PAGE * BITS // 16))[:, :, None]
    column = tl.arange(0, COLUMNS)[None, None, :]
    words = tl.load(row + column, mask=mask[:, :, None], other=0)
    if BITS == 3:
        highs = tl.load(row + COLUMNS + column % (COLUMNS // 2), mask=mask[:, :, None], other=0)
        return nibble_words(words, highs, column, COLUMNS // 2)
    else:
        return words, words


@triton.jit
def word_products(
    stacked, words, odd_words, unit, BITS: tl.constexpr, LANES: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Products with the codes of words ``[L, C, COLUMNS]``: for each plane of their bytes a tile, in order.

    A word holds two bytes, neighbours in every plane. A code stays where it is in its byte and is taken for the bits
    of a float16: one below its normal numbers, and exact in products all the same. Of three bits ``nibble_words`` made
    words of the even planes and ``odd_words`` of the odd ones.
    """
    count: tl.constexpr = 2 if BITS == 3 else 8 // BITS  # codes of a byte
    width: tl.constexpr = 4 if BITS == 3 else BITS
    sets: tl.constexpr = 2 if BITS == 3 else 1
    even, odd, tiles = (), (), ()
    for k in tl.static_range(count):
        even = even + (code_products(stacked, words, k * width, BITS, False),)
    for k in tl.static_range(count):
        odd = odd + (code_products(stacked, words, k * width, BITS, True),)
    if BITS == 3:
        for k in tl.static_range(count):
            even = even + (code_products(stacked, odd_words, k * width, BITS, False),)
        for k in tl.static_range(count):
            odd = odd + (code_products(stacked, odd_words, k * width, BITS, True),)
    for k in tl.static_range(count):
        for turn in tl.static_range(sets):
            found = tl.join(even[turn * count + k], odd[turn * count + k]).reshape(LANES, M, 2 * COLUMNS)
            tiles = tiles + (found * (unit * (1.0 / (1 << (k * width))))[:, None, None],)
    return tiles


@triton.jit
def code_products(stacked, words, SHIFT: tl.constexpr, BITS: tl.constexpr, IS_ODD: tl.constexpr):
    """Products with the codes that lie at bit ``SHIFT`` of the lower bytes of words, or of the upper ones."""
    both = tl.zeros([stacked[0].shape[0], stacked[0].shape[1], words[0].shape[2]], tl.float32)
    for k in tl.static_range(len(words)):
        codes = masked(odd_bytes(words[k]) if IS_ODD else words[k], ((1 << BITS) - 1) << SHIFT)
        both += product(stacked[k], codes.to(tl.float16, bitcast=True))
    return tl.sum(both.reshape(both.shape[0], 2, both.shape[1] // 2, both.shape[2]), 1)
