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
    REGISTERS,
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
    warps_for,
)

_WORDS = 2048  # of a page, as many as a warp has registers for: 64 tokens of 128 channels, four bits each


def score_shape(page_size: int, dim: int, bits: int, per_kv: int) -> dict[str, int]:
    """Constants of the kernels that score pages: four at once; of raw and of the largest ones a part of one."""
    heads, plane = power_of_two(per_kv), page_size * field_bits(bits) // 8  # tokens that lie side by side in a plane
    is_large = dim > 128 or heads > 8  # the query takes the registers
    is_whole = bits != 16 and _words(page_size, dim, bits) <= 2 * _WORDS and not is_large
    if bits == 3:  # elsewhere its two planes do not fit beside the query
        is_whole = heads <= 8 and dim == power_of_two(dim) and page_size >= 64 and page_size * dim <= 64 * 128
    tokens = plane if plane >= 16 else page_size
    if not is_whole:
        tokens = min(page_size, tile_tokens(dim) // (2 if bits == 16 or heads * dim > 1024 else 1))
    return {
        "PAGE": page_size, "BITS": bits, "D": dim, "DP": max(16, power_of_two(dim)), "PER_KV": per_kv,
        "M": max(8, heads), "LANES": 4 if is_whole else 1,
        "T": tokens,
    }  # fmt: skip


def score_launch(shape: dict[str, int], is_wide: bool) -> dict[str, int]:
    """How to launch a kernel of ``score_shape``: a warp takes a page, or two where one has not enough registers."""
    words = _words(shape["PAGE"], shape["D"], shape["BITS"])
    is_large = shape["M"] > 8 or shape["D"] > 128 or words > _WORDS
    if shape["LANES"] == 1:
        return {"num_warps": warps_for(is_wide, shape["D"]), "num_stages": 2, "maxnreg": REGISTERS}
    return {"num_warps": 8 if is_large else 4, "num_stages": 1, "maxnreg": REGISTERS}


def _words(page_size: int, dim: int, bits: int) -> int:
    """Words of a page in registers; codes of three bits are made to nibbles."""
    return page_size * power_of_two(dim) * (4 if bits == 3 else bits) // 16


@triton.jit
def score_pages(
    q, q_unit, codes, lows, steps, page_head, exists, offset, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PAGE: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Logits of pages ``page_head [L]`` of one KV head, where they exist; see ``page_logits``."""
    d = tl.arange(0, DP)
    mask = exists[:, None] & (d < D)[None, :]
    channel = page_head[:, None] * D + d[None, :]
    if BITS == 16:
        high, rest, unit = q, q, tl.zeros([LANES], tl.float32)
        bias = tl.zeros([LANES, M], tl.float32)
    else:
        low = tl.load(lows + channel, mask=mask, other=0.0).to(tl.float32)
        bias = tl.sum(q[None, :, :] * low[:, None, :], 2)
        high, rest, unit = fold_steps(q, tl.load(steps + channel, mask=mask, other=0.0).to(tl.float32))
    return page_logits(codes, channel, mask, offset, high, rest, unit, bias, q_unit, M, DP, PAGE, BITS, T, LANES)


@triton.jit
def fold_steps(q, step):
    """Fold steps ``[L, C]`` of channels into the query ``[M, C]``: two float16 parts ``[L, M, C]``, and their unit."""
    unit, inverse = exact_unit(tl.max(step, 1))
    scale = step * inverse[:, None] * 1024  # products below 4096: far from float16's limit, and its least number
    folded = q[None, :, :] * scale[:, None, :]
    high = folded.to(tl.float16)
    return high, (folded - high.to(tl.float32)).to(tl.float16), unit * (1.0 / 1024)


@triton.jit
def page_logits(
    codes, channel, mask, offset, high, rest, unit, bias, q_unit, M: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr,
    BITS: tl.constexpr, T: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Logits of the tokens of pages: a tuple of tiles ``[L, M, T]`` in order; of a single page one, from ``offset`` on.

    Args:
        codes, channel, mask: pages, and the rows ``[L, C]`` of them to be read.
        high, rest, unit: the query, with the rows' steps (see ``fold_steps``); raw keys have none.
        bias: ``[L, M]`` what the rows' least numbers, and channels that are not read, add.
        q_unit: ``[M]`` what logits are multiplied by.
    """
    tiles = ()
    if LANES == 1:
        t = offset + tl.arange(0, T)
        if BITS == 16:
            place = codes + (channel * PAGE)[:, :, None] + t[None, None, :]
            keys = tl.load(place, mask=mask[:, :, None], other=0.0)
            found = product(high, keys.reshape(C, T)).reshape(LANES, M, T)
        else:
            row = codes + (channel * (PAGE * BITS // 8)).reshape(C)[:, None]
            bits = unpack_codes(row, t[None, :], PAGE, BITS, mask.reshape(C)[:, None]).to(tl.uint16)
            keys = bits.to(tl.float16, bitcast=True)
            found = product(rest.reshape(M, C), keys) + product(high.reshape(M, C), keys)
            found = found.reshape(LANES, M, T) * (unit * CODE)[:, None, None]
        tiles = ((found + bias[:, :, None]) * q_unit[None, :, None],)
    else:
        field: tl.constexpr = 2 if BITS == 3 else BITS
        columns: tl.constexpr = PAGE * field // 16
        row = codes.to(tl.pointer_type(tl.uint16), bitcast=True) + (channel * (PAGE * BITS // 16))[:, :, None]
        column = tl.arange(0, columns)[None, None, :]
        words = tl.load(row + column, mask=mask[:, :, None], other=0)
        odd_words = words
        if BITS == 3:
            highs = tl.load(row + columns + column % (columns // 2), mask=mask[:, :, None], other=0)
            words, odd_words = nibble_words(words, highs, column, columns // 2)
        found = word_products(stack(high, rest), words, odd_words, unit * CODE, BITS, LANES, M, columns)
        for k in tl.static_range(8 // field):
            tiles = tiles + ((found[k] + bias[:, :, None]) * q_unit[None, :, None],)
        if 2 * columns < T:
            tiles = (join_tiles(tiles, LANES, M, T, 8 // field),)
    return tiles


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
        even = even + (code_products(stacked, words, k * width, BITS),)
    for k in tl.static_range(count):
        odd = odd + (code_products(stacked, odd_bytes(words), k * width, BITS),)
    if BITS == 3:
        for k in tl.static_range(count):
            even = even + (code_products(stacked, odd_words, k * width, BITS),)
        for k in tl.static_range(count):
            odd = odd + (code_products(stacked, odd_bytes(odd_words), k * width, BITS),)
    for k in tl.static_range(count):
        for turn in tl.static_range(sets):
            found = tl.join(even[turn * count + k], odd[turn * count + k]).reshape(LANES, M, 2 * COLUMNS)
            tiles = tiles + (found * (unit * (1.0 / (1 << (k * width))))[:, None, None],)
    return tiles


@triton.jit
def code_products(stacked, words, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """Products with the codes that lie at bit ``SHIFT`` of the lower bytes of words."""
    codes = masked(words, ((1 << BITS) - 1) << SHIFT)
    return stacked_product(stacked, codes.to(tl.float16, bitcast=True))
