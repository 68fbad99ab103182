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

REGISTERS = 255  # left to itself, ptxas spills a little to fit one more block on a multiprocessor
FEW_REGISTERS = 168  # of a thread, where they are enough: three blocks of four warps on a multiprocessor, not two
SPLITS = 64  # parts of a row that different blocks of threads take
LEAST_TOKENS = 256  # tokens that are worth a block of threads
TILE_NUMBERS = 8192  # numbers of a tile of keys or values: 64 tokens of 128 channels

CODE = tl.constexpr(float(1 << 24))  # the bits of a code, taken for those of a float16, times this are the code

QUERY = tl.constexpr(1024.0)  # unit of a query: times steps below 2 far from float16's limit, and its least number

# Triton's interpreter multiplies the bits of bfloat16 matrices, not their numbers (3.6 and 3.9)
_WIDENS = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


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
    if _WIDENS:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounding_of_product(a, b, unit, is_rest):
    """``a * (b * unit)`` of float16 numbers, or what rounding left of it where ``is_rest`` is not 0.0 but -1.0."""
    if _WIDENS:
        b = b * unit
        high = a * b
        exact = a.to(tl.float32) * b.to(tl.float32)
        return tl.where(is_rest != 0.0, (exact - high.to(tl.float32)).to(tl.float16), high)
    else:  # a fused multiplication knows the product that it takes the rounded one from
        return tl.inline_asm_elementwise(
            """{ .reg .b32 x, y;
            mul.rn.f16x2 y, $2, $3; mul.rn.f16x2 x, $1, y; mul.rn.f16x2 x, x, $4; fma.rn.f16x2 $0, $1, y, x; }""",
            "=r,r,r,r,r", [a, b, unit, is_rest], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def exponential(x):
    """``exp(x)``, and zero where that is below float32's normal numbers, which cost as much again."""
    powers = x * 1.4426950408889634
    if _WIDENS:
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


@triton.jit
def load_rests(place):
    """Which of two columns is what rounding left, -1.0 for 0.0, ``[1, 1, 1, 2]``, see ``loaded``."""
    part = tl.arange(0, 2)[None, None, None, :]
    return loaded(tl.where(part == 0, 0.0, -1.0).to(tl.float16), part > 1, place)


@triton.jit
def heads_of(found):
    """Sums of the two columns of each head, ``[L, R, 2 * M]`` to ``[L, R, M]``."""
    return tl.sum(found.reshape(found.shape[0], found.shape[1], found.shape[2] // 2, 2), 3)


@triton.jit
def code_rows(words, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """Codes at bit ``SHIFT`` of the lower and of the upper bytes of words ``[L, K, W]``, as rows ``[L, 2 * W, K]``.

    A word holds two bytes, neighbours in every plane. A code stays where it is in its byte and is taken for the bits
    of a float16: one below its normal numbers, and exact in products all the same.
    """
    even = masked(words, ((1 << BITS) - 1) << SHIFT)
    odd = masked(odd_bytes(words), ((1 << BITS) - 1) << SHIFT)
    rows = tl.permute(tl.join(even, odd).to(tl.float16, bitcast=True), (0, 3, 2, 1))
    return rows.reshape(words.shape[0], 2 * words.shape[2], words.shape[1])


@triton.jit
def masked(words, MASK: tl.constexpr):
    """``words & MASK``, two words an instruction; left to itself the compiler takes three for two."""
    if _WIDENS:
        return words & MASK
    else:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [words, tl.full(words.shape, MASK, tl.uint16)], dtype=tl.uint16,
            is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def odd_bytes(words):
    """The upper bytes of words, where the lower ones were; above them is what ``masked`` takes away."""
    if _WIDENS:
        return words >> 8
    else:
        return tl.inline_asm_elementwise(
            "shr.b32 $0, $1, 8;", "=r,r", [words], dtype=tl.uint16, is_pure=True, pack=2
        )  # fmt: skip


@triton.jit
def nibble_words(words, highs, is_first):
    """Words of codes of three bits, one in every four: those of the even fields, and of the odd ones.

    The plane of two bits has twice the words of the plane of one, ``highs``: word ``c`` belongs to word
    ``c % (count / 2)`` of them, and takes its even bits in the first half of the columns (see ``load_halves``), its odd
    bits in the other.
    """
    if _WIDENS:
        turn = (is_first == 0).to(tl.uint16)
        even = (words & 0x3333) | ((highs << (2 - turn)) & 0x4444)
        odd = ((words >> 2) & 0x3333) | ((highs >> turn) & 0x4444)
    else:  # two words an instruction, as in masked; the fourth bits of the codes are left to it
        even, odd = tl.inline_asm_elementwise(
            """{ .reg .b32 x, y, z;
            shl.b32 x, $3, 2; shl.b32 y, $3, 1; lop3.b32 x, x, y, $4, 0xE4; lop3.b32 $0, $2, x, 0x33333333, 0xE4;
            shr.b32 y, $3, 1; lop3.b32 y, $3, y, $4, 0xE4; shr.b32 z, $2, 2; lop3.b32 $1, z, y, 0x33333333, 0xE4; }""",
            "=&r,=r,r,r,r", [words, highs, tl.broadcast_to(is_first, words.shape)], dtype=(tl.uint16, tl.uint16),
            is_pure=True, pack=2,
        )  # fmt: skip
    return even, odd


@triton.jit
def repeated(x):
    """Columns ``[L, K, W]`` twice, ``[L, K, 2 * W]``."""
    both = tl.broadcast_to(x[:, :, None, :], (x.shape[0], x.shape[1], 2, x.shape[2]))
    return both.reshape(x.shape[0], x.shape[1], 2 * x.shape[2])


@triton.jit
def load_halves(place, COLUMNS: tl.constexpr):
    """All bits where a column is of the first half, else none, ``[1, 1, COLUMNS]``."""
    column = tl.arange(0, COLUMNS)[None, None, :]
    return loaded(tl.where(column < COLUMNS // 2, 0xFFFF, 0).to(tl.uint16), column >= COLUMNS, place)


@triton.jit
def loaded(pattern, never, place):
    """``pattern``, as if it were loaded from ``place``, which is read where ``never`` is true.

    The compiler moves changes of layout across loads, but not across numbers of lanes: what is multiplied with such a
    pattern would pass through shared memory on its way to tensor cores.
    """
    places = place.to(tl.pointer_type(pattern.dtype), bitcast=True) + tl.zeros(pattern.shape, tl.int32)
    return tl.load(places, mask=never, other=pattern)


@triton.jit
def join_tiles(tiles, LANES: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """One, two or four tiles ``[L, M, ...]`` side by side, ``[L, M, WIDTH]``."""
    if COUNT == 1:
        return tiles[0]
    elif COUNT == 2:
        return tl.permute(tl.join(tiles[0], tiles[1]), (0, 1, 3, 2)).reshape(LANES, M, WIDTH)
    else:
        joined = tl.join(tl.join(tiles[0], tiles[1]), tl.join(tiles[2], tiles[3]))
        return tl.permute(joined, (0, 1, 4, 3, 2)).reshape(LANES, M, WIDTH)


@triton.jit
def soften(logits, top, total, acc):
    """One step of the online softmax over the last axis: weights, and what was summed so far in their unit."""
    axis: tl.constexpr = len(logits.shape) - 1
    new_top = tl.maximum(top, tl.max(logits, axis))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing yet: not a number from inf - inf
    weights = tl.exp(logits - tl.expand_dims(base, axis))
    shrink = tl.exp(top - base)
    return weights, new_top, total * shrink + tl.sum(weights, axis), acc * tl.expand_dims(shrink, axis)
