"""Logits of packed pages on a GPU, from their codes as they are.

Codes are neither shifted nor converted nor scaled: a code's bits, left where they are, are a float16 number below the
normal ones, which tensor cores multiply exactly. Powers of two and the channels' steps are folded into the query, and
into what comes out. A warp takes a page and reads its words once (``_triton_key_words``). Raw keys, and codes of pages
too large for registers, which are unpacked, are read in parts by all warps.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._triton_key_words import exact_columns, load_patterns, query_columns, score_columns
from ._triton_tiles import (
    FEW_REGISTERS,
    FUSED,
    QUERY,
    REGISTERS,
    channel_parts,
    exact_unit,
    field_bits,
    load_query,
    power_of_two,
    product,
    tile_tokens,
    unpack_codes,
)
from ._triton_words import CODE

WARPS = tl.constexpr(4)
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
        "PAGE": page_size, "BITS": bits, **channels, "PER_KV": per_kv, "M": max(4 if is_whole else 8, heads),
        "LANES": 4 if is_whole else 1, "T": tokens,
    }  # fmt: skip


def logits_launch(shape: dict[str, int], has_tokens: bool, is_wide: bool) -> dict[str, Any]:
    """How to launch ``logits_kernel``: ``score_launch``, with few registers where they are enough for it."""
    fits = shape["BITS"] != 3 or not (has_tokens or shape["RP"])
    registers = {"maxnreg": FEW_REGISTERS} if shape["LANES"] > 1 and fits and not is_wide else {}
    return {**score_launch(shape), **registers}


def score_launch(shape: dict[str, int]) -> dict[str, Any]:
    """How to launch a kernel of ``score_shape``: a warp takes a page, or two where one has not enough registers."""
    is_whole = shape["LANES"] > 1
    words = _words(shape["PAGE"], shape["DP"], shape["BITS"])
    is_large = words > _WORDS if is_whole else shape["M"] * shape["DP"] > 2048
    return {"num_warps": 8 if is_large else 4, "num_stages": 1 if is_whole else 2, "maxnreg": REGISTERS, **FUSED}


def _words(page_size: int, channels: int, bits: int) -> int:
    """Words of a page in registers; codes of three bits are made to nibbles."""
    return page_size * channels * (4 if bits == 3 else bits) // 16


@triton.jit
def load_key_query(
    query, row_stride, head_stride, row, kv_head, scaling, PER_KV: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, RP: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Query heads of one KV head as ``score_pages`` takes them (three things), and their logits' factors ``[M]``."""
    q, q_unit = load_query(query, row_stride, head_stride, row, kv_head, scaling, PER_KV, M, D, DP, RP, BITS == 16)
    if LANES == 1:
        return q, q, q, q_unit
    else:
        patterns = load_patterns(query, BITS, PAGE)
        columns, low_columns = (), ()
        for k in tl.static_range(len(q)):
            column = query_columns(q[k], patterns[0], query.dtype.element_ty == tl.float32)
            columns, low_columns = columns + (column,), low_columns + (exact_columns(column, patterns[0]),)
        return columns, low_columns, patterns, q_unit


@triton.jit
def score_pages(
    q, low_q, patterns, q_unit, codes, lows, steps, page_head, exists, offset, D: tl.constexpr, DP: tl.constexpr,
    PAGE: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Logits of pages ``page_head [L]`` of one KV head: a tuple of tiles ``[L, M, T]``, in order; of a single page one,
    from ``offset`` on. What does not exist is ``-inf``.
    """
    if LANES == 1:
        return score_tokens(q, q_unit, codes, lows, steps, page_head, exists, offset, D, DP, PAGE, BITS, T)
    else:
        return score_columns(
            q, low_q, patterns, q_unit, codes, lows, steps, page_head, exists, D, DP, PAGE, BITS, T, LANES
        )  # fmt: skip


@triton.jit
def score_tokens(
    q, q_unit, codes, lows, steps, page_head, exists, offset, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    BITS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Logits of the tokens of a page from ``offset`` on, see ``token_logits``."""
    places, widths = (), ()
    bias = tl.zeros([1, q[0].shape[0]], tl.float32)
    for k in tl.static_range(len(q)):
        d = k * DP + tl.arange(0, q[k].shape[1])
        mask = exists[:, None] & (d < D)[None, :]
        channel = page_head[:, None] * D + d[None, :]
        places = places + ((channel, mask),)
        if BITS != 16:
            widths = widths + (tl.load(steps + channel, mask=mask, other=0.0),)
            low = tl.load(lows + channel, mask=mask, other=0.0).to(tl.float32)
            bias += tl.sum(q[k][None, :, :] * low[:, None, :], 2) * (1 / QUERY)
    return token_logits(codes, places, offset, q, widths, bias, q_unit, exists, PAGE, BITS, T)


@triton.jit
def token_logits(
    codes, places, offset, q, steps, bias, q_unit, exists, PAGE: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr
):
    """A tile ``[1, M, T]`` of a page, in a tuple.

    Args:
        codes, places: pages, and for each part of the channels the rows ``[1, C]`` of the page, and which to read.
        q: ``[M, C]`` of each part, see ``load_query``.
        steps: ``[1, C]`` of each part; raw keys have none.
        bias: ``[1, M]`` what the rows' least numbers, and channels that are not read, add.
        q_unit: ``[M]`` what logits are multiplied by.
        exists: ``[1]`` whether there is such a page.
    """
    found = tl.zeros([q_unit.shape[0], T], tl.float32)
    if BITS == 16:
        for k in tl.static_range(len(q)):
            found += token_products(codes, places[k], offset, q[k], q[k], PAGE, BITS, T)
    else:
        highs, rests, unit = fold_steps(q, steps)
        for k in tl.static_range(len(q)):
            found += token_products(codes, places[k], offset, highs[k], rests[k], PAGE, BITS, T)
        found *= tl.max(unit, 0) * CODE
    logits = (found + tl.max(bias, 0)[:, None]) * q_unit[:, None]
    return (tl.where(exists[:, None, None], logits[None, :, :], float("-inf")),)


@triton.jit
def fold_steps(q, steps):
    """Fold steps ``[1, C]`` of channels into the query ``[M, C]``: two float16 parts ``[1, M, C]``, and their unit.

    All but the unit are tuples, of the parts of the channels.
    """
    largest = tl.max(steps[0].to(tl.float32), 1)
    for k in tl.static_range(1, len(q)):
        largest = tl.maximum(largest, tl.max(steps[k].to(tl.float32), 1))
    unit, inverse = exact_unit(largest)
    highs, rests = (), ()
    for k in tl.static_range(len(q)):
        folded = q[k][None, :, :] * (steps[k].to(tl.float32) * inverse[:, None])[:, None, :]
        high = folded.to(tl.float16)
        highs, rests = highs + (high,), rests + ((folded - high.to(tl.float32)).to(tl.float16),)
    return highs, rests, unit * (1 / QUERY)


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
