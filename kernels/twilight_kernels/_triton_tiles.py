"""Tiles of packed pages on a GPU: what the Triton kernels share.

Logits are exact to float32 although they come from tensor cores: codes are whole numbers that float16 holds, and
the query, folded with a page's steps, is the sum of two float16 numbers (11 + 11 bits and two signs). Both are kept
within range by powers of two, which are exact. Letters: M query heads of a KV head, padded to 16; DP, VP head dims,
padded to powers of two; T tokens of a tile.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

SPLITS = 64  # parts of a row that different blocks of threads take
LEAST_TOKENS = 256  # tokens that are worth a block of threads
TILE_NUMBERS = 8192  # numbers of a tile of keys or values: 64 tokens of 128 channels

# Triton's interpreter multiplies the bits of bfloat16 matrices, not their numbers (3.6 and 3.9)
_WIDENS = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def power_of_two(count: int) -> int:
    """Return the least power of two that is ``count`` or more."""
    return 1 << max(0, count - 1).bit_length()


def tile_tokens(head_dim: int, is_wide: bool = False) -> int:
    """Tokens that are read at once, within a page or one by one; few if products are not made by tensor cores."""
    return 16 if is_wide else min(128, TILE_NUMBERS // power_of_two(head_dim))


def warps_for(is_wide: bool, *dims: int) -> int:
    """Warps of a block: more where numbers are float32, whose products need registers, or heads are large."""
    return 8 if is_wide or max(dims) > 128 else 4


def grid_splits(count: int, least: int) -> int:
    """Splits that a row of at most ``count`` things can have (see ``segment``)."""
    return max(1, min(SPLITS, -(-count // least)))


def last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def product(a, b):
    """``a @ b`` in float32, exact products of float16, bfloat16 or float32 numbers."""
    if _WIDENS:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def exact_unit(largest):
    """Power of two at or below ``largest``, and its inverse, both within float32's normal numbers."""
    bits = largest.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 0x00800000), 0x7E000000)
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def segment(count, split, SPLITS: tl.constexpr, LEAST: tl.constexpr):
    """First of ``count`` things that a split takes, and the one after its last; a row's own length decides."""
    size = tl.maximum(tl.cdiv(count, SPLITS), LEAST)
    return split * size, tl.minimum(split * size + size, count)


@triton.jit
def unpack_codes(row, i, COUNT: tl.constexpr, BITS: tl.constexpr, mask):
    """Codes ``i`` of packed rows of ``COUNT`` codes that begin at ``row``; planar, see ``layout``."""
    if BITS == 8:
        return tl.load(row + i, mask=mask, other=0)
    elif BITS == 3:
        pairs: tl.constexpr = COUNT // 4
        singles: tl.constexpr = COUNT // 8
        low = tl.load(row + i % pairs, mask=mask, other=0) >> (i // pairs * 2).to(tl.uint8)
        high = tl.load(row + pairs + i % singles, mask=mask, other=0) >> (i // singles).to(tl.uint8)
        return (low & 3) | ((high & 1) << 2)
    else:
        size: tl.constexpr = COUNT * BITS // 8
        packed = tl.load(row + i % size, mask=mask, other=0)
        return (packed >> (i // size * BITS).to(tl.uint8)) & ((1 << BITS) - 1)


@triton.jit
def load_query(
    query, row_stride, head_stride, row, kv_head, scaling,
    PER_KV: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, IS_RAW: tl.constexpr,
):  # fmt: skip
    """Query heads of one KV head ``[M, DP]``, and what their logits are to be multiplied by ``[M]``.

    For packed keys they are scaled by a power of two to below 2.
    """
    g = tl.arange(0, M)
    d = tl.arange(0, DP)
    heads = row.to(tl.int64) * row_stride + (kv_head * PER_KV + g) * head_stride
    q = tl.load(query + heads[:, None] + d[None, :], mask=(g < PER_KV)[:, None] & (d < D)[None, :], other=0.0)
    if IS_RAW:
        return q, tl.zeros([M], tl.float32) + scaling
    else:
        wide = q.to(tl.float32) * scaling
        unit, inverse = exact_unit(tl.max(tl.abs(wide), 1))
        return wide * inverse[:, None], unit


@triton.jit
def fold_page(
    q, lows, steps, page_head, exists, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, IS_RAW: tl.constexpr
):
    """Fold a page's scales into the query: two float16 parts ``[M, DP]``, their unit, and ``q . lo`` ``[M]``."""
    if IS_RAW:
        return q, q, 1.0, tl.zeros([M], tl.float32)
    else:
        d = tl.arange(0, DP)
        mask = d < tl.where(exists, D, 0)
        step = tl.load(steps + page_head * D + d, mask=mask, other=0.0).to(tl.float32)
        low = tl.load(lows + page_head * D + d, mask=mask, other=0.0).to(tl.float32)
        unit, inverse = exact_unit(tl.max(step, 0))
        folded = q * (step * inverse * 1024)[None, :]  # below 4096: far from float16's limit, and from its least number
        high = folded.to(tl.float16)
        rest = (folded - high.to(tl.float32)).to(tl.float16)
        return high, rest, unit * (1.0 / 1024), tl.sum(q * low[None, :], 1)


@triton.jit
def page_logits(
    codes, page_head, exists, t, high, rest, unit, bias, q_unit,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Logits ``[M, T]`` of tokens ``t [T]`` of one page of one KV head."""
    d = tl.arange(0, DP)
    mask = (d < D)[:, None] & (t < tl.where(exists, PAGE, 0))[None, :]
    channel = page_head * D + d
    if BITS == 16:
        keys = tl.load(codes + channel[:, None] * PAGE + t[None, :], mask=mask, other=0.0)
        return product(high, keys) * q_unit[:, None]
    else:
        row = codes + channel[:, None] * (PAGE * BITS // 8)
        found = unpack_codes(row, t[None, :], PAGE, BITS, mask).to(tl.float16)
        logits = product(rest, found) + product(high, found)
        return (logits * unit + bias[:, None]) * q_unit[:, None]


@triton.jit
def load_values(
    codes, lows, steps, token_head, exists,
    DV: tl.constexpr, VP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Values ``[T, VP]`` of the tokens ``token_head [T]``; packed ones halved, so that float16 holds the largest."""
    d = tl.arange(0, VP)
    mask = exists[:, None] & (d < DV)[None, :]
    if BITS == 16:
        return tl.load(codes + token_head[:, None] * DV + d[None, :], mask=mask, other=0.0)
    else:
        groups: tl.constexpr = (DV + GROUP - 1) // GROUP
        if groups <= 4:  # one load a group and token, spread over the channels in registers
            low = tl.load(lows + token_head * groups, mask=exists, other=0.0).to(tl.float32)[:, None]
            step = tl.load(steps + token_head * groups, mask=exists, other=0.0).to(tl.float32)[:, None]
            for group in tl.static_range(1, groups):
                is_past = (d >= group * GROUP)[None, :]
                next_low = tl.load(lows + token_head * groups + group, mask=exists, other=0.0)
                next_step = tl.load(steps + token_head * groups + group, mask=exists, other=0.0)
                low = tl.where(is_past, next_low.to(tl.float32)[:, None], low)
                step = tl.where(is_past, next_step.to(tl.float32)[:, None], step)
        else:
            at = token_head[:, None] * groups + (d // GROUP)[None, :]
            low = tl.load(lows + at, mask=mask, other=0.0).to(tl.float32)
            step = tl.load(steps + at, mask=mask, other=0.0).to(tl.float32)
        row = codes + token_head[:, None] * (DV * BITS // 8)
        found = unpack_codes(row, d[None, :], DV, BITS, mask).to(tl.float32)
        values = found * (step * 0.5) + low * 0.5
        if NARROW:
            values = values.to(tl.float16)
        return values


@triton.jit
def soften(logits, top, total, acc):
    """One step of the online softmax: weights ``[M, T]``, and what was summed so far in their unit."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing yet: not a number from inf - inf
    weights = tl.exp(logits - base[:, None])
    shrink = tl.exp(top - base)
    return weights, new_top, total * shrink + tl.sum(weights, 1), acc * shrink[:, None]


@triton.jit
def add_weighed(weights, values, acc):
    """``acc + weights @ values``; weights in two parts, so that narrow tensor cores lose nothing of them."""
    if values.dtype == tl.float32:
        return acc + product(weights, values)
    else:
        high = weights.to(values.dtype)
        rest = (weights - high.to(tl.float32)).to(values.dtype)
        return acc + (product(high, values) + product(rest, values))
