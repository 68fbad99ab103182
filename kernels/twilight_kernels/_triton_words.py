"""Packed words as operands of tensor cores, and the columns that they are multiplied with, two for a query head.

A column of a head holds float16 numbers, the other what rounding left of them: together 22 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import INTERPRETS

CODE = tl.constexpr(float(1 << 24))  # the bits of a code, taken for those of a float16, times this are the code


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
    if INTERPRETS:
        return words & MASK
    else:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [words, tl.full(words.shape, MASK, tl.uint16)], dtype=tl.uint16,
            is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def odd_bytes(words):
    """The upper bytes of words, where the lower ones were; above them is what ``masked`` takes away."""
    if INTERPRETS:
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
    if INTERPRETS:
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
def rounding_of_product(a, b, unit, is_rest):
    """``a * (b * unit)`` of float16 numbers, or what rounding left of it where ``is_rest`` is not 0.0 but -1.0."""
    if INTERPRETS:
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
def load_rests(place):
    """Which of two columns is what rounding left, -1.0 for 0.0, ``[1, 1, 1, 2]``, see ``loaded``."""
    part = tl.arange(0, 2)[None, None, None, :]
    return loaded(tl.where(part == 0, 0.0, -1.0).to(tl.float16), part > 1, place)


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
def heads_of(found):
    """Sums of the two columns of each head, ``[L, R, 2 * M]`` to ``[L, R, M]``."""
    return tl.sum(found.reshape(found.shape[0], found.shape[1], found.shape[2] // 2, 2), 3)


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
