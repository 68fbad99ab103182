"""Queries as bytes for matrix tiles of CPUs, and the logits that sums of bytes by codes make.

With ``m`` the largest of the folded queries ``x`` (``q * step``) of a head and a page, ``x * RANGE / m`` is rounded to
an integer of 23 bits, plus 2^22 to be positive, and cut into three bytes, its *limbs*. A further row of ones gives the
sum of codes that takes the 2^22 away again. What rounding leaves is ``m * 2 ** -23``, as much as float32 leaves of a
number like ``m``; all products with codes and their sums are exact.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._numba_ir import (
    F32,
    I8,
    I16,
    I32,
    LANES,
    Loop,
    call,
    chosen,
    constant,
    element,
    int64,
    larger,
    literals,
    load,
    splat,
    store,
    zeros,
)
from ._numba_lanes import key_tile_scale

LIMBS = 3
STEP = 64  # channels of a tile
HEADS = 5  # query heads whose limbs fit in the 16 rows of a tile
ONES = 15  # the row of ones
_RANGE = 2.0**22 - 2  # the largest integer, less what rounding may add
_UNIT = 1.5 * 2.0**23  # added to a number, leaves it in the lower 23 bits, rounded, plus 2^22
_SHARE = 6  # 2^22 in units of the highest limb is 2^6
_SMALLEST = 2.0**-100  # stands for folded queries that are all zero
_LINE = 64
_NUMBERS, _WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


@intrinsic
def write_limbs(typingctx, heads, query, steps, lows, wide, folded, limbs, numbers):
    """Fold a page's steps into the queries and write them as limbs, the lows as a bias.

    Literals: ``heads``. ``wide``: channels, a multiple of 64, zero beyond the keys' own. Addresses: float32
    ``query [heads, wide]``, ``steps [wide]``, ``lows [wide]``; ``folded``, as large as the query, for use here;
    uint8 ``limbs [16 * tiles, wide]``; float32 ``numbers [3, heads up to a multiple of 4]``, which receives what brings
    limbs to integers, what undoes it, and the bias, which is NaN where the queries are not finite.
    """
    (heads_,) = literals(heads)
    signature = types.void(heads, *(types.int64,) * 7)

    def codegen(context, builder, _signature, args):
        query, steps, lows, wide, folded, limbs, numbers = args[1:]
        row_bytes, padded = builder.shl(wide, int64(2)), -(-heads_ // 4) * 4
        for first in range(0, heads_, 4):
            here = range(first, min(heads_, first + 4))
            largest, moved = _fold(builder, here, query, steps, lows, wide, row_bytes, folded)
            _write_numbers(builder, largest, moved, builder.add(numbers, int64(4 * first)), 4 * padded)
        loop = Loop(builder, builder.lshr(wide, int64(6)), [])
        for head in range(heads_):
            row = builder.add(folded, builder.mul(row_bytes, int64(head)))
            scale = splat(builder, load(builder, builder.add(numbers, int64(4 * head)), F32))
            place = element(builder, row, loop.index, 4 * STEP)
            for limb, digits in enumerate(_limbs(builder, place, scale)):
                target = builder.add(limbs, builder.mul(wide, int64(row_of_limb(head, limb))))
                store(builder, digits, element(builder, target, loop.index, STEP), STEP)
        loop.close([])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def sum_limbs(typingctx, kind, page_size, heads, sums, numbers, out, out_stride):
    """Write the logits of one page from the int32 ``sums [16 * tiles, page_size]`` of limbs and codes.

    Literals: ``kind``, ``page_size``, ``heads``. Addresses: ``sums``; ``numbers`` of ``write_limbs``; ``out``
    float32, ``out_stride`` floats from head to head.
    """
    kind_, page_, heads_ = literals(kind, page_size, heads)
    signature = types.void(kind, page_size, heads, *(types.int64,) * 4)

    def codegen(context, builder, _signature, args):
        sums, numbers, out, out_stride = args[3:]
        padded = -(-heads_ // 4) * 4
        for head in range(heads_):
            place = builder.add(out, builder.mul(out_stride, int64(4 * head)))
            scale, bias = (
                splat(builder, load(builder, builder.add(numbers, int64(4 * (padded * row + head))), F32))
                for row in (1, 2)
            )
            for tile in range(page_ // LANES):
                total = None
                for limb in reversed(range(LIMBS)):
                    digits = _sum(builder, sums, page_, row_of_limb(head, limb), tile)
                    if limb == LIMBS - 1:
                        digits = builder.sub(
                            digits, builder.shl(_sum(builder, sums, page_, ONES, tile), constant(_SHARE, LANES, I32))
                        )
                    digits = builder.sitofp(digits, _NUMBERS)
                    total = digits if total is None else _fma(builder, total, constant(256.0, LANES), digits)
                undone = builder.fmul(scale, key_tile_scale(kind_, page_, tile))
                store(builder, _fma(builder, total, undone, bias), builder.add(place, int64(4 * LANES * tile)))
        return context.get_dummy_value()

    return signature, codegen


def row_of_limb(head: int, limb: int) -> int:
    """Row of the tiles, one below the other, that holds a limb of a query head."""
    return 16 * (head // HEADS) + LIMBS * (head % HEADS) + limb


def _fold(builder, heads, query, steps, lows, wide, row_bytes, folded):
    """Write the folded queries of at most four heads; return their largest, and the products with the lows, by lane."""
    loop = Loop(builder, builder.lshr(wide, int64(4)), [zeros(LANES)] * (2 * len(heads)))
    step, low = (
        load(builder, element(builder, place, loop.index, 4 * LANES), _NUMBERS, _LINE) for place in (steps, lows)
    )
    new = []
    for number, head in enumerate(heads):
        shift = builder.mul(row_bytes, int64(head))
        numbers = load(builder, element(builder, builder.add(query, shift), loop.index, 4 * LANES), _NUMBERS, 4)
        product = builder.fmul(numbers, step)
        store(builder, product, element(builder, builder.add(folded, shift), loop.index, 4 * LANES), _LINE)
        new.append(_larger_size(builder, product, loop.values[2 * number]))
        new.append(_fma(builder, numbers, low, loop.values[2 * number + 1]))
    loop.close(new)
    return loop.values[0::2], loop.values[1::2]


def _write_numbers(builder, largest, moved, out, row_bytes: int) -> None:
    """Write what brings the folded queries of four heads to integers, what undoes it, and their biases."""
    top = _across(builder, largest, lambda a, b: larger(builder, a, b))
    bias = _across(builder, moved, builder.fadd)
    top = larger(builder, top, constant(_SMALLEST, 4))
    bias = builder.fadd(bias, builder.fsub(top, top))  # infinity less infinity is NaN
    scale = builder.fdiv(constant(_RANGE, 4), top)
    undone = builder.fdiv(top, constant(_RANGE, 4))
    for row, numbers in enumerate((scale, undone, bias)):
        store(builder, numbers, builder.add(out, int64(row * row_bytes)))


def _across(builder, vectors, combine):
    """Combine the lanes of each of at most four vectors; return the results as one of four lanes."""
    vectors = [*vectors, *[zeros(LANES)] * (4 - len(vectors))]
    pairs = [_interleaved(builder, combine, a, b, 1) for a, b in (vectors[:2], vectors[2:])]
    quads = _interleaved(builder, combine, *pairs, 2)
    while quads.type.count > 4:
        half = quads.type.count // 2
        parts = [chosen(builder, quads, quads, range(first, first + half)) for first in (0, half)]
        quads = combine(*parts)
    return quads


def _interleaved(builder, combine, a, b, run: int):
    """Combine neighbouring runs of lanes of two vectors; those of both stand in turns."""
    lanes = range(0, LANES, 2 * run)
    first, second = (
        chosen(builder, a, b, [vector + at + shift + i for at in lanes for vector in (0, LANES) for i in range(run)])
        for shift in (0, run)
    )
    return combine(first, second)


def _limbs(builder, place, scale):
    """The three limbs of 64 folded queries, each a vector of 64 bytes."""
    bytes_ = ir.VectorType(I8, STEP)
    order = [16 * lane + 4 * i + limb for lane in range(4) for limb in range(4) for i in range(4)]
    rounded = []
    for vector in range(4):
        x = load(builder, builder.add(place, int64(4 * LANES * vector)), _NUMBERS, _LINE)
        digits = builder.bitcast(_fma(builder, x, scale, constant(_UNIT, LANES)), bytes_)
        rounded.append(builder.bitcast(chosen(builder, digits, digits, order), _WORDS))
    low, high = (
        [_within_lanes(builder, a, b, words) for a, b in (rounded[:2], rounded[2:])]
        for words in ((0, 16, 1, 17), (2, 18, 3, 19))
    )
    return [
        _within_lanes(builder, *low, (0, 1, 16, 17)),
        _within_lanes(builder, *low, (2, 3, 18, 19)),
        _within_lanes(builder, *high, (0, 1, 16, 17)),
    ]


def _within_lanes(builder, a, b, words):
    """Choose, in each four words of two vectors, the same ones."""
    return chosen(builder, a, b, [4 * lane + i for lane in range(4) for i in words])


def _larger_size(builder, a, b):
    """The larger of two vectors' absolute values."""
    absolute = [ir.Constant(I32, 0b1011), b, ir.Constant(I16, -1), ir.Constant(I32, 4)]
    return call(builder, "llvm.x86.avx512.mask.range.ps.512", a.type, a, b, *absolute)


def _sum(builder, sums, page: int, row: int, tile: int):
    return load(builder, builder.add(sums, int64(4 * (page * row + LANES * tile))), _WORDS, _LINE)


def _fma(builder, a, b, c):
    return call(builder, f"llvm.fma.v{LANES}f32", a.type, a, b, c)
