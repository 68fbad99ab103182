"""Vector code over rows of numbers: extremes, quantization, selection.

Written as LLVM IR where the loop vectorizer has no answer (maxima, compression) or would treat rows of a few
dozen numbers as leftovers. Nothing here reorders sums or fuses a multiplication with an addition.
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
    I64,
    LANES,
    Loop,
    constant,
    element,
    int64,
    larger,
    literals,
    load,
    rotated,
    smaller,
    splat,
    store,
    zeros,
)

_SHORT = 8  # lanes where a row may be any multiple of eight long


@intrinsic
def largest_of_vectors(typingctx, address, vectors):
    """Return the largest of ``16 * vectors`` float32 numbers, at least -3e38."""

    def codegen(context, builder, _signature, args):
        loop = Loop(builder, args[1], [constant(-3.0e38, LANES)])
        row = load(builder, element(builder, args[0], loop.index, 4 * LANES), ir.VectorType(F32, LANES), 4)
        loop.close([larger(builder, row, loop.values[0])])
        top = loop.values[0]
        for half in (8, 4, 2, 1):
            top = larger(builder, top, rotated(builder, top, half))
        return builder.extract_element(top, ir.Constant(I32, 0))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def range_of_row(typingctx, address, count, out):
    """Write the smallest, the largest and the sum of ``x - x`` of a float32 row.

    The sum is NaN unless all are finite; the comparisons ignore NaN. ``count`` is a positive multiple of 8.
    """

    def codegen(context, builder, _signature, args):
        vector = ir.VectorType(F32, _SHORT)
        first = load(builder, args[0], vector, 4)
        rest = builder.sub(builder.lshr(args[1], int64(3)), int64(1))
        loop = Loop(builder, rest, [first, first, builder.fsub(first, first)])
        place = builder.add(element(builder, args[0], loop.index, 4 * _SHORT), int64(4 * _SHORT))
        row = load(builder, place, vector, 4)
        low, high, doubt = loop.values
        loop.close(
            [
                smaller(builder, row, low),
                larger(builder, row, high),
                builder.fadd(doubt, builder.fsub(row, row)),
            ]
        )
        low, high, doubt = loop.values
        for half in (4, 2, 1):
            low = smaller(builder, rotated(builder, low, half), low)
            high = larger(builder, rotated(builder, high, half), high)
            doubt = builder.fadd(rotated(builder, doubt, half), doubt)
        for place, vector in enumerate((low, high, doubt)):
            number = builder.extract_element(vector, ir.Constant(I32, 0))
            store(builder, number, builder.add(args[2], int64(4 * place)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def quantize_row(typingctx, is_wide, row, count, lo, inverse, levels, codes):
    """Write ``floor((x - lo) * inverse + 0.5)`` within ``0 .. levels`` of a float32 row as uint8.

    ``lo`` and ``inverse`` are addresses of one float32, or of one a number if the literal ``is_wide`` is 1.
    ``count`` is a multiple of 8.
    """
    (wide,) = literals(is_wide)

    def codegen(context, builder, _signature, args):
        row, count, lo, inverse, levels, codes = args[1:]
        top = splat(builder, levels, _SHORT)
        loop = Loop(builder, builder.lshr(count, int64(3)), [])
        x = load(builder, element(builder, row, loop.index, 4 * _SHORT), ir.VectorType(F32, _SHORT), 4)
        x = builder.fmul(
            builder.fsub(x, _scale(builder, wide, lo, loop.index)), _scale(builder, wide, inverse, loop.index)
        )
        x = larger(builder, builder.fadd(x, constant(0.5, _SHORT)), zeros(_SHORT))
        code = builder.fptosi(smaller(builder, x, top), ir.VectorType(I32, _SHORT))
        store(
            builder,
            builder.trunc(code, ir.VectorType(I8, _SHORT)),
            element(builder, codes, loop.index, _SHORT),
            1,
        )
        loop.close([])
        return context.get_dummy_value()

    address = types.int64
    return types.void(is_wide, address, address, address, address, types.float32, address), codegen


@intrinsic
def dequantize_row(typingctx, is_wide, codes, count, lo, step, row):
    """Write ``lo + code * step`` of uint8 codes as float32; the scales are those of ``quantize_row``."""
    (wide,) = literals(is_wide)

    def codegen(context, builder, _signature, args):
        codes, count, lo, step, row = args[1:]
        loop = Loop(builder, builder.lshr(count, int64(3)), [])
        code = load(builder, element(builder, codes, loop.index, _SHORT), ir.VectorType(I8, _SHORT), 1)
        code = builder.sitofp(builder.zext(code, ir.VectorType(I32, _SHORT)), ir.VectorType(F32, _SHORT))
        x = builder.fmul(code, _scale(builder, wide, step, loop.index))
        x = builder.fadd(_scale(builder, wide, lo, loop.index), x)
        store(builder, x, element(builder, row, loop.index, 4 * _SHORT))
        loop.close([])
        return context.get_dummy_value()

    return types.void(is_wide, *(types.int64,) * 5), codegen


@intrinsic
def compress_between(typingctx, a, b, tiles, low, high, out_a, out_b):
    """Copy the pairs of two float32 rows of which ``low <= a < high``; return how many.

    The rows are ``16 * tiles`` long. The targets may be the rows themselves, else need room for as many.
    """

    def codegen(context, builder, _signature, args):
        low, high = splat(builder, args[3]), splat(builder, args[4])
        loop = Loop(builder, args[2], [int64(0)])
        first = load(builder, element(builder, args[0], loop.index, 4 * LANES), ir.VectorType(F32, LANES), 4)
        second = load(builder, element(builder, args[1], loop.index, 4 * LANES), ir.VectorType(F32, LANES), 4)
        inside = builder.and_(builder.fcmp_ordered(">=", first, low), builder.fcmp_ordered("<", first, high))
        targets = [(first, args[5]), (second, args[6])]
        loop.close([_compress(builder, inside, targets, loop.values[0])])
        return loop.values[0]

    address = types.int64
    return types.int64(address, address, address, types.float32, types.float32, address, address), codegen


@intrinsic
def flag_at_least(typingctx, row, tiles, limit, flags):
    """Set the uint8 flags of the numbers of a float32 row that are at least ``limit``; return how many."""

    def codegen(context, builder, _signature, args):
        limit = splat(builder, args[2])
        loop = Loop(builder, args[1], [int64(0)])
        row = load(builder, element(builder, args[0], loop.index, 4 * LANES), ir.VectorType(F32, LANES), 4)
        kept = builder.fcmp_ordered(">=", row, limit)
        place, flags = element(builder, args[3], loop.index, LANES), ir.VectorType(I8, LANES)
        store(builder, builder.or_(load(builder, place, flags, 1), builder.zext(kept, flags)), place, 1)
        loop.close([builder.add(loop.values[0], _count(builder, kept))])
        return loop.values[0]

    return types.int64(types.int64, types.int64, types.float32, types.int64), codegen


@intrinsic
def lower_unflagged(typingctx, row, tiles, flags, lowest):
    """Write ``lowest`` to the numbers of a float32 row whose uint8 flag is 0."""

    def codegen(context, builder, _signature, args):
        lowest = splat(builder, args[3])
        loop = Loop(builder, args[1], [])
        place = element(builder, args[0], loop.index, 4 * LANES)
        row = load(builder, place, ir.VectorType(F32, LANES), 4)
        is_set = _is_set(builder, element(builder, args[2], loop.index, LANES))
        store(builder, builder.select(is_set, row, lowest), place)
        loop.close([])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32), codegen


@intrinsic
def count_flags(typingctx, flags, tiles):
    """Return how many of ``16 * tiles`` uint8 flags are set."""

    def codegen(context, builder, _signature, args):
        loop = Loop(builder, args[1], [int64(0)])
        is_set = _is_set(builder, element(builder, args[0], loop.index, LANES))
        loop.close([builder.add(loop.values[0], _count(builder, is_set))])
        return loop.values[0]

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def flagged_positions(typingctx, flags, tiles, out):
    """Write the int32 positions, ascending, of the uint8 flags that are set; return how many."""

    def codegen(context, builder, _signature, args):
        loop = Loop(builder, args[1], [int64(0)])
        is_set = _is_set(builder, element(builder, args[0], loop.index, LANES))
        start = splat(builder, builder.trunc(builder.mul(loop.index, int64(LANES)), I32))
        places = builder.add(start, ir.Constant(start.type, list(range(LANES))))
        loop.close([_compress(builder, is_set, [(places, args[2])], loop.values[0])])
        return loop.values[0]

    return types.int64(types.int64, types.int64, types.int64), codegen


def _compress(builder, mask, targets, at):
    """Append the lanes in ``mask`` of each vector to its target of ``at`` numbers; return the new end."""
    count = _count(builder, mask)
    with builder.if_then(builder.icmp_signed(">", count, int64(0))):
        for vector, address in targets:
            pointer = builder.inttoptr(element(builder, address, at, 4), vector.type.element.as_pointer())
            kind = ir.FunctionType(ir.VoidType(), [vector.type, pointer.type, mask.type])
            name = f"llvm.masked.compressstore.v{LANES}{'f' if vector.type.element == F32 else 'i'}32"
            store = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            builder.call(store, [vector, pointer, mask])
    return builder.add(at, count)


def _is_set(builder, address):
    """Which of sixteen uint8 flags are set."""
    flags = load(builder, address, ir.VectorType(I8, LANES), 1)
    return builder.icmp_unsigned("!=", flags, constant(0, LANES, I8))


def _count(builder, mask):
    """Lanes in ``mask``."""
    return builder.zext(builder.ctpop(builder.bitcast(mask, I16)), I64)


def _scale(builder, wide: int, address, index):
    """Eight scales from an address, or one of them eight times."""
    if wide:
        return load(builder, element(builder, address, index, 4 * _SHORT), ir.VectorType(F32, _SHORT), 4)
    return splat(builder, load(builder, address, F32), _SHORT)
