"""Packed keys on matrix tiles of CPUs (AMX): codes are bytes, and so become the queries folded with a page's steps.

With ``m`` the largest of the folded queries ``x`` of a head, ``x = m / RANGE * (65536 x2 + 256 x1 + x0)`` but for
``m / RANGE / 2``, where ``x0``, ``x1`` and ``x2`` are signed bytes. Their products with codes are summed exactly, so
that no sum depends on what is summed beside it.

Tiles take four channels at a time, one *quad*, and sixteen quads a step. Byte by byte as they arise from vectors of
float32, limbs of the quads of a step stand in the order 0, 4, 8, 12, 1, 5, ...; so do the codes.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._numba_amx import multiply_strip
from ._numba_ir import (
    F32,
    I8,
    I16,
    I32,
    LANES,
    Loop,
    constant,
    element,
    int64,
    larger,
    literals,
    load,
    prefetch,
    splat,
    store,
    zeros,
)
from ._numba_lanes import key_tile_scale
from .page_codec import planes

LIMBS = 3  # bytes of a folded query
STEP = 64  # channels of a tile
HEADS = 5  # query heads whose limbs fit in the 16 rows of a tile
ONES = 15  # row of ones
_RANGE = 2.0**22 - 2  # the largest number, less what rounding may add
_UNIT = 1.5 * 2.0**23  # numbers added to it are integers in the lower bits
_SMALLEST = 2.0**-100  # stands for folded queries that are all zero
_LINE = 64
_AT_ONCE = 4  # tiles of 16 tokens that are multiplied at a time
_VECTOR = ir.VectorType(I32, LANES)


@intrinsic
def unpack_key_tiles(typingctx, kind, page_size, codes, key_dim, out, ahead):
    """Write the codes of one page as uint8 ``out[row of quad, token, channel of quad]``.

    Codes of one plane stay where they are in their byte: ``sum_limbs`` undoes it. Literals: ``kind`` (packed),
    ``page_size``. Addresses: ``codes`` of channel 0; ``ahead``, codes that will be read next, and are fetched meanwhile.
    """
    kind_, page_ = literals(kind, page_size)
    signature = types.void(kind, page_size, *(types.int64,) * 4)

    def codegen(context, builder, _signature, args):
        codes, key_dim, out, ahead = args[2:]
        channel_bytes, tiles = page_ * kind_ // 8, page_ // LANES
        loop = Loop(builder, builder.lshr(key_dim, int64(3)), [])
        source, next_source = (element(builder, place, loop.index, 8 * channel_bytes) for place in (codes, ahead))
        for line in range(0, 8 * channel_bytes, _LINE):
            prefetch(builder, builder.add(next_source, int64(line)))
        target = element(builder, out, _row_of_pair(builder, loop.index), tiles * _LINE)
        for quad in range(2):
            found = {}
            here = builder.add(source, int64(quad * 4 * channel_bytes))
            for tile in range(tiles):
                row = _code_row(builder, kind_, page_, here, tile, found)
                store(builder, row, builder.add(target, int64(_LINE * (4 * quad * tiles + tile))), _LINE)
        loop.close([])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def write_limbs(typingctx, heads, query, steps, lows, wide, folded, limbs, numbers):
    """Fold a page's steps into the queries and write them as limbs, the lows as a bias.

    Literals: ``heads``. ``wide``: channels, a multiple of 64, zero beyond the keys' own. Addresses: float32
    ``query [heads, wide]``, ``steps [wide]``, ``lows [wide]``; ``folded``, as large as the query, for use here;
    int8 ``limbs [16 * tiles, wide]``; float32 ``numbers [3, heads up to a multiple of 4]``, which receives what brings
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
                target = builder.add(limbs, builder.mul(wide, int64(_row_of_limb(head, limb))))
                store(builder, digits, element(builder, target, loop.index, STEP), STEP)
        loop.close([])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def multiply_limbs(typingctx, page_size, heads, limbs, wide, codes, sums):
    """Set ``sums[r, t] = sum_d limbs[r, d] * codes[d, t]``.

    Literals: ``page_size``, ``heads``. Addresses: ``limbs`` of ``write_limbs``, ``codes`` of ``unpack_key_tiles``,
    int32 ``sums [16 * tiles, page_size]``.
    """
    page_, heads_ = literals(page_size, heads)
    signature = types.void(page_size, heads, *(types.int64,) * 4)

    def codegen(context, builder, _signature, args):
        limbs, wide, codes, sums = args[2:]
        stride, at_once = int64(4 * page_), min(_AT_ONCE, page_ // LANES)
        steps = builder.lshr(wide, int64(6))
        for first in range(0, _row_of_limb(heads_ - 1, 0) + 1, 16):
            a = builder.add(limbs, builder.mul(wide, int64(first)))
            for start in range(0, 4 * page_, _LINE * at_once):
                b, c = builder.add(codes, int64(start)), builder.add(sums, int64(4 * page_ * first + start))
                multiply_strip(builder, "tdpbuud", at_once, 0, 0, a, wide, steps, int64(0), b, stride, c, stride)
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
        padded, vector = -(-heads_ // 4) * 4, ir.VectorType(F32, LANES)
        for head in range(heads_):
            place = builder.add(out, builder.mul(out_stride, int64(4 * head)))
            scale, bias = (
                splat(builder, load(builder, builder.add(numbers, int64(4 * (padded * row + head))), F32))
                for row in (1, 2)
            )
            for tile in range(page_ // LANES):
                total = None
                for limb in reversed(range(LIMBS)):
                    digits = _sum(builder, sums, page_, _row_of_limb(head, limb), tile)
                    if limb == LIMBS - 1:
                        digits = builder.sub(digits, builder.shl(_sum(builder, sums, page_, ONES, tile), constant(6, LANES, I32)))
                    digits = builder.sitofp(digits, vector)
                    total = digits if total is None else _fma(builder, total, constant(256.0, LANES), digits)
                undone = builder.fmul(scale, key_tile_scale(kind_, page_, tile))
                store(builder, _fma(builder, total, undone, bias), builder.add(place, int64(4 * LANES * tile)))
        return context.get_dummy_value()

    return signature, codegen


def _fold(builder, heads, query, steps, lows, wide, row_bytes, folded):
    """Write the folded queries of at most four heads; return their largest, and the products with the lows, by lane."""
    count, vector = len(heads), ir.VectorType(F32, LANES)
    loop = Loop(builder, builder.lshr(wide, int64(4)), [zeros(LANES)] * (2 * count))
    step, low = (load(builder, element(builder, place, loop.index, 4 * LANES), vector, _LINE) for place in (steps, lows))
    new = []
    for number, head in enumerate(heads):
        shift = builder.mul(row_bytes, int64(head))
        numbers = load(builder, element(builder, builder.add(query, shift), loop.index, 4 * LANES), vector, 4)
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
        parts = [
            _chosen(builder, quads, quads, range(first, first + half)) for first in (0, half)
        ]
        quads = combine(*parts)
    return quads


def _interleaved(builder, combine, a, b, run: int):
    """Combine neighbouring runs of lanes of two vectors; those of both stand in turns."""
    lanes = range(0, LANES, 2 * run)
    first, second = (
        _chosen(builder, a, b, [vector + at + shift + i for at in lanes for vector in (0, LANES) for i in range(run)])
        for shift in (0, run)
    )
    return combine(first, second)


def _limbs(builder, place, scale):
    """The three limbs of 64 folded queries, each a vector of 64 bytes."""
    bytes_ = ir.VectorType(I8, STEP)
    order = [16 * lane + 4 * i + limb for lane in range(4) for limb in range(4) for i in range(4)]
    rounded = []
    for vector in range(4):
        x = load(builder, builder.add(place, int64(4 * LANES * vector)), ir.VectorType(F32, LANES), _LINE)
        digits = builder.bitcast(_fma(builder, x, scale, constant(_UNIT, LANES)), bytes_)
        rounded.append(builder.bitcast(_chosen(builder, digits, digits, order), _VECTOR))
    low, high = (
        [_within_lanes(builder, a, b, chosen) for a, b in (rounded[:2], rounded[2:])]
        for chosen in ((0, 16, 1, 17), (2, 18, 3, 19))
    )
    return [
        _within_lanes(builder, *low, (0, 1, 16, 17)),
        _within_lanes(builder, *low, (2, 3, 18, 19)),
        _within_lanes(builder, *high, (0, 1, 16, 17)),
    ]


def _within_lanes(builder, a, b, chosen):
    """Choose, in each four words of two vectors, the same ones."""
    return _chosen(builder, a, b, [4 * lane + i for lane in range(4) for i in chosen])


def _larger_size(builder, a, b):
    """The larger of two vectors' absolute values."""
    absolute = [ir.Constant(I32, 0b1011), b, ir.Constant(I16, -1), ir.Constant(I32, 4)]
    return _call(builder, "llvm.x86.avx512.mask.range.ps.512", a.type, a, b, *absolute)


def _code_row(builder, kind: int, page: int, source, tile: int, found):
    """Sixteen tokens of one quad as a vector of 64 bytes, four channels a token."""
    widths, start, shift, total = planes(kind), 0, 0, None
    tokens = range(LANES * tile, LANES * (tile + 1))
    for width in widths:
        size = page * width // 8
        piece, first = min(size, LANES), tokens[0] % size
        if (start, first) not in found:
            packed = _quad(builder, source, page * kind // 8, start + first, piece)
            order = [channel * piece + token % piece for token in range(LANES) for channel in range(4)]
            found[start, first] = builder.bitcast(_chosen(builder, packed, packed, order), _VECTOR)
        fields, mask = [token // size for token in tokens], ((1 << width) - 1) * 0x01010101
        codes = found[start, first]
        if len(widths) > 1:
            codes = builder.lshr(codes, ir.Constant(_VECTOR, [field * width for field in fields]))
            codes = builder.shl(builder.and_(codes, constant(mask, LANES, I32)), constant(shift, LANES, I32))
        elif width < 8:
            codes = builder.and_(codes, ir.Constant(_VECTOR, [mask << field * width for field in fields]))
        total = codes if total is None else builder.or_(total, codes)
        start, shift = start + size, shift + width
    return total


def _quad(builder, source, channel_bytes: int, start: int, piece: int):
    """The ``piece`` bytes from ``start`` on of each of four channels."""
    if piece == channel_bytes:
        return load(builder, source, ir.VectorType(I8, 4 * piece), 1)
    parts = [
        load(builder, builder.add(source, int64(channel * channel_bytes + start)), ir.VectorType(I8, piece), 1)
        for channel in range(4)
    ]
    while len(parts) > 1:
        order = range(2 * parts[0].type.count)
        parts = [_chosen(builder, a, b, order) for a, b in zip(parts[0::2], parts[1::2])]
    return parts[0]


def _row_of_pair(builder, pair):
    """Row of the tiles, one below the other, that holds the first of two quads; the second is four rows below."""
    step = builder.shl(builder.lshr(pair, int64(3)), int64(4))
    inner = builder.or_(
        builder.shl(builder.and_(pair, int64(1)), int64(3)), builder.and_(builder.lshr(pair, int64(1)), int64(3))
    )
    return builder.or_(step, inner)


def _sum(builder, sums, page: int, row: int, tile: int):
    return load(builder, builder.add(sums, int64(4 * (page * row + LANES * tile))), _VECTOR, _LINE)


def _row_of_limb(head: int, limb: int) -> int:
    """Row of the tiles, one below the other, that holds a limb of a query head."""
    return 16 * (head // HEADS) + LIMBS * (head % HEADS) + limb


def _chosen(builder, a, b, lanes):
    """The lanes of two vectors, one behind the other, that are listed."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def _fma(builder, a, b, c):
    return _call(builder, f"llvm.fma.v{LANES}f32", a.type, a, b, c)


def _call(builder, name: str, result, *args):
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), args)
