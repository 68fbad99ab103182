"""Tiles of packed pages on a GPU: what the Triton kernels share.

Logits are exact to float32 although they come from tensor cores: codes are whole numbers that float16 holds, and
the query, folded with a page's steps, is the sum of two float16 numbers (11 + 11 bits and two signs). Both are kept
within range by powers of two, which are exact. Letters: M query heads of a KV head, padded; DP, VP head dims,
padded to powers of two; T tokens of a tile.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

REGISTERS = 255  # left to itself, ptxas spills a little to fit one more block on a multiprocessor
FEW_REGISTERS = 168  # of a thread, where they are enough: three blocks of four warps on a multiprocessor, not two
FUSED = {"enable_fp_fusion": True}  # products with sums in one instruction; Triton 3.10 has to be asked for it
SPLITS = 64  # parts of a row that different blocks of threads take
LEAST_TOKENS = 256  # tokens that are worth a block of threads
LARGE_BLOCKS = (90, 100, 103)  # chips whose blocks may have 227 KB of shared memory; 80 has 163, most others 99
TILE_NUMBERS = 8192  # numbers of a tile of keys or values: 64 tokens of 128 channels

QUERY = tl.constexpr(1024.0)  # unit of a query: times steps below 2 far from float16's limit, and its least number

# Triton's interpreter multiplies the bits of bfloat16 matrices, not their numbers (3.6 and 3.9), and knows no assembly
INTERPRETS = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def has_large_blocks() -> bool:
    """Whether the current GPU is one of ``LARGE_BLOCKS``."""
    return not INTERPRETS.value and triton.runtime.driver.active.get_current_target().arch in LARGE_BLOCKS


def power_of_two(count: int) -> int:
    """Return the least power of two that is ``count`` or more."""
    return 1 << max(0, count - 1).bit_length()


def channel_parts(dim: int) -> dict[str, int]:
    """Constants by which the channels of keys are taken in two parts, ``DP`` and ``RP``, or padded to ``DP`` alone."""
    main = power_of_two(dim + 1) // 2
    rest = max(16, power_of_two(dim - main))
    if main < 16 or main == dim or main + rest >= power_of_two(dim):
        return {"D": dim, "DP": max(16, power_of_two(dim)), "RP": 0}
    return {"D": dim, "DP": main, "RP": rest}


def field_bits(bits: int) -> int:
    """Bits that a byte of the first plane holds of each code; of three one lies in a plane of its own."""
    return 2 if bits == 3 else bits


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
def product(a, b, acc=None):
    """``a @ b``, added to ``acc``, in float32, exact products of float16, bfloat16 or float32 numbers."""
    if INTERPRETS:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def exponential(x):
    """``exp(x)``, and zero where that is below float32's normal numbers, which cost as much again."""
    powers = x * 1.4426950408889634
    if INTERPRETS:
        return tl.exp2(powers)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [powers], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip


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
    query, row_stride, head_stride, row, kv_head, scaling, PER_KV: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, RP: tl.constexpr, IS_RAW: tl.constexpr,
):  # fmt: skip
    """Query heads of one KV head, ``[M, C]`` of each part of the channels, and their logits' factors ``[M]``.

    For packed keys they are scaled by powers of two to below 2 * ``QUERY``.
    """
    g = tl.arange(0, M)
    exists = g < PER_KV
    heads = query + row.to(tl.int64) * row_stride + (kv_head * PER_KV + g) * head_stride
    parts = (load_heads(heads, exists, 0, D, DP),)
    if RP > 0:
        parts = parts + (load_heads(heads, exists, DP, D, RP),)
    if IS_RAW:
        return parts, tl.zeros([M], tl.float32) + scaling
    else:
        largest = tl.zeros([M], tl.float32)
        wide, scaled = (), ()
        for k in tl.static_range(len(parts)):
            wide = wide + (parts[k].to(tl.float32),)
            largest = tl.maximum(largest, tl.max(tl.abs(wide[k]), 1))
        unit, inverse = exact_unit(largest)
        for k in tl.static_range(len(parts)):
            scaled = scaled + (wide[k] * inverse[:, None] * QUERY,)
        return scaled, unit * scaling


@triton.jit
def load_heads(heads, exists, FIRST: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """Channels from ``FIRST`` on of query heads that exist, ``[M, C]``."""
    d = FIRST + tl.arange(0, C)
    return tl.load(heads[:, None] + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0)
