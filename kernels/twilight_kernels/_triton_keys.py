"""Logits of packed pages on a GPU, from their codes as they are.

Whole words of packed codes are read once, and codes are neither shifted nor converted nor scaled: a code's bits, left
where they are, are a float16 number below the normal ones, which tensor cores multiply exactly. Powers of two and the
channels' steps are folded into the query, and into what comes out. One warp takes one page. Codes of three bits, whose
planes differ, and raw keys are unpacked, and all warps take a part of one page.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import (
    CODE,
    REGISTERS,
    exact_unit,
    join_tiles,
    masked,
    power_of_two,
    product,
    stack,
    stacked_product,
    tile_tokens,
    unpack_codes,
    warps_for,
)


def score_shape(page_size: int, dim: int, bits: int, per_kv: int) -> dict[str, int]:
    """Constants of the kernels that score pages: four at once; of three bits and raw ones a part of one."""
    heads, plane = power_of_two(per_kv), page_size * bits // 8  # tokens that lie side by side in a plane
    is_whole = bits not in (3, 16)
    tokens = plane if plane >= 16 else page_size
    if not is_whole:
        tokens = min(page_size, tile_tokens(dim) if bits == 3 else tile_tokens(dim) // 2)
    return {
        "PAGE": page_size, "BITS": bits, "D": dim, "DP": max(16, power_of_two(dim)), "PER_KV": per_kv,
        "M": max(8, heads), "LANES": 4 if is_whole else 1,
        "T": tokens,
    }  # fmt: skip


def score_launch(shape: dict[str, int], is_wide: bool) -> dict[str, int]:
    """How to launch a kernel of ``score_shape``: a warp takes a page, or two where one has not enough registers."""
    is_large = shape["M"] > 8 or shape["D"] > 128 or shape["BITS"] * shape["PAGE"] * shape["DP"] > 4 * 8192
    if shape["LANES"] == 1:
        return {"num_warps": warps_for(is_wide, shape["D"]), "num_stages": 2, "maxnreg": REGISTERS}
    return {"num_warps": 8 if is_large else 4, "num_stages": 1, "maxnreg": REGISTERS}


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
    row = codes
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
        columns: tl.constexpr = PAGE * BITS // 16
        row = codes.to(tl.pointer_type(tl.uint16), bitcast=True) + (channel * columns)[:, :, None]
        words = tl.load(row + tl.arange(0, columns)[None, None, :], mask=mask[:, :, None], other=0)
        found = word_products(stack(high, rest), words, unit * CODE, BITS, LANES, M, columns)
        for k in tl.static_range(8 // BITS):
            tiles = tiles + ((found[k] + bias[:, :, None]) * q_unit[None, :, None],)
        if 2 * columns < T:
            tiles = (join_tiles(tiles, LANES, M, T, 8 // BITS),)
    return tiles


@triton.jit
def word_products(
    stacked, words, unit, BITS: tl.constexpr, LANES: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Products with the codes of words ``[L, C, COLUMNS]``: for each plane of their bytes a tile, in order.

    A word holds two bytes, neighbours in every plane. A code stays where it is in its byte and is taken for the bits
    of a float16: one below its normal numbers, and exact in products all the same.
    """
    even, odd, tiles = (), (), ()
    for k in tl.static_range(8 // BITS):
        codes = masked(words, ((1 << BITS) - 1) << (k * BITS)).to(tl.float16, bitcast=True)
        even = even + (stacked_product(stacked, codes),)
    for k in tl.static_range(8 // BITS):
        codes = masked(words >> 8, ((1 << BITS) - 1) << (k * BITS)).to(tl.float16, bitcast=True)
        odd = odd + (stacked_product(stacked, codes),)
    for k in tl.static_range(8 // BITS):
        found = tl.join(even[k], odd[k]).reshape(LANES, M, 2 * COLUMNS)
        tiles = tiles + (found * (unit * (1.0 / (1 << (k * BITS))))[:, None, None],)
    return tiles
