"""Softmax weights in bfloat16, two keys side by side as matrix tiles want them, in ten instructions for 32 weights.

A bfloat16 number is its own logarithm, nearly: read as an integer it is ``128 * (127 + log2(x))`` but for a bend of up
to 11 units between powers of two. So ``exp2`` is one multiplication, one conversion to an integer, and a look into a
table of the bend (Schraudolph, A fast, compact approximation of the exponential function, 1999). The result is the
nearest bfloat16 number or its neighbour. What it divides by is the sum of the numbers as rounded.

Weights are relative to a reference logit of each row, which is raised only when a weight would exceed 2 ** 30: any
reference serves, as floating point has the same digits everywhere.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from ._numba_ir import F32, I8, I16, I32, LANES, Loop, constant, element, int64, load, splat, store, zeros
from ._numba_numbers import LOWEST, f32_at, fast

UNREFERENCED = np.float32(3.0e38)  # offset of a row that has no reference logit yet
_OCTAVE = 128  # units of a power of two
UNITS = np.float32(_OCTAVE * np.log2(np.e))  # of a logit
_ONE = np.float32(127 * _OCTAVE)  # of the weight 1
_MOST = (127 + 30) * _OCTAVE
_LINE = 256  # bytes of 64 logits, or of 64 pairs of weights
_HALVES = np.arange(_OCTAVE) / _OCTAVE
# how far a power of two lies below the straight line, for two neighbouring units
_BEND = [round(float(x)) for x in (_OCTAVE * (_HALVES + 1 - 2**_HALVES)).reshape(-1, 2).mean(1)]


@fast
def pair_weights(is_first, logits, count, factor, offset, total, shrink, weights):
    """Turn logits ``[count, 64]`` into ``weights [count / 2, 64, 2]`` and add them to ``total [64]``.

    All but the count and the factor, ``UNITS`` times the scaling, are addresses. ``offset [64]`` is minus the
    reference times the factor, plus ``_ONE``. Returns whether references were raised; ``shrink [64]`` is then what
    earlier weights are to be multiplied by.
    """
    if not is_first and not _weigh(logits, weights, count // 2, factor, offset, total):
        return False
    _largest(logits, count, shrink)
    tops, offsets, totals = carray(f32_at(shrink), (64,)), carray(f32_at(offset), (64,)), carray(f32_at(total), (64,))
    for r in range(64):
        new = min(offsets[r], _ONE - tops[r] * factor)
        tops[r] = np.exp2(max((new - offsets[r]) * np.float32(1 / _OCTAVE), np.float32(-126)))
        offsets[r] = new
        totals[r] *= tops[r]
    _weigh(logits, weights, count // 2, factor, offset, total)
    return True


@intrinsic
def _weigh(typingctx, logits, weights, pairs, factor, offset, total):
    """Write weights and add them to their ``total [64]``; or only return true if one is too large."""

    def codegen(context, builder, _signature, args):
        logits, weights, pairs, factor, offset, total = args
        vector = ir.VectorType(F32, LANES)
        lanes = [int64(4 * LANES * v) for v in range(4)]
        offsets = [load(builder, builder.add(offset, at), vector, 4) for at in lanes]
        factors, ones = splat(builder, factor), constant(0x3F803F80, LANES, I32)
        loop = Loop(builder, pairs, [zeros(LANES)] * 4 + [constant(0, 2 * LANES, I16)] * 4)
        source = element(builder, logits, loop.index, 2 * _LINE)
        target, summed, most = element(builder, weights, loop.index, _LINE), [], []
        for v, at in enumerate(lanes):
            place = builder.add(source, at)
            units = []
            for offset_bytes in (0, _LINE):
                logit = load(builder, builder.add(place, int64(offset_bytes)), vector, 4)
                units.append(_to_int(builder, _call(builder, "llvm.fma.v16f32", vector, logit, factors, offsets[v])))
            bits = _bend(builder, _side_by_side(builder, *units))
            store(builder, bits, builder.add(target, at))
            pair = builder.bitcast(bits, ones.type)
            summed.append(_call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", vector, loop.values[v], pair, ones))
            before = loop.values[4 + v]
            most.append(builder.select(builder.icmp_unsigned(">", bits, before), bits, before))
        loop.close(summed + most)
        found = ir.Constant(ir.IntType(1), 0)
        for bits in loop.values[4:]:
            is_large = builder.icmp_unsigned(">", bits, constant(_MOST, 2 * LANES, I16))
            mask = builder.bitcast(is_large, I32)
            found = builder.or_(found, builder.icmp_unsigned("!=", mask, ir.Constant(I32, 0)))
        with builder.if_then(builder.not_(found)):
            for at, summed in zip(lanes, loop.values):
                place = builder.add(total, at)
                store(builder, builder.fadd(load(builder, place, vector, 4), summed), place)
        return found

    return types.boolean(*(types.int64,) * 3, types.float32, types.int64, types.int64), codegen


@intrinsic
def _largest(typingctx, logits, count, out):
    """Write the largest of each column of logits ``[count, 64]``."""

    def codegen(context, builder, _signature, args):
        logits, count, out = args
        vector = ir.VectorType(F32, LANES)
        lanes = [int64(4 * LANES * v) for v in range(4)]
        loop = Loop(builder, count, [constant(float(LOWEST), LANES)] * 4)
        row = element(builder, logits, loop.index, _LINE)
        new = [load(builder, builder.add(row, at), vector, 4) for at in lanes]
        loop.close([builder.select(builder.fcmp_ordered(">", a, b), a, b) for a, b in zip(new, loop.values)])
        for at, largest in zip(lanes, loop.values):
            store(builder, largest, builder.add(out, at))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 3), codegen


def _to_int(builder, x):
    """Nearest integers; what is far out becomes the lowest."""
    kind = ir.VectorType(I32, LANES)
    every, nearest = ir.Constant(I16, -1), ir.Constant(I32, 4)  # all lanes, rounded as the CPU is set to
    nothing = constant(0, LANES, I32)
    return _call(builder, "llvm.x86.avx512.mask.cvtps2dq.512", kind, x, nothing, every, nearest)


def _side_by_side(builder, even, odd):
    """Two vectors of integers as pairs of unsigned 16-bit ones; what does not fit is the nearest that does."""
    halves = ir.VectorType(I16, 2 * LANES)
    packed = _call(builder, "llvm.x86.avx512.packusdw.512", halves, even, odd)
    order = [8 * part + 4 * (n % 2) + n // 2 for part in range(4) for n in range(8)]
    order_ = ir.Constant(ir.VectorType(I32, 2 * LANES), order)
    return builder.shuffle_vector(packed, ir.Constant(halves, ir.Undefined), order_)


def _bend(builder, units):
    """Units of the logarithm to bits of a bfloat16 number."""
    octets = ir.VectorType(I8, 4 * LANES)
    table = ir.Constant(octets, _BEND)
    index = builder.bitcast(builder.lshr(units, constant(1, 2 * LANES, I16)), octets)
    bend = _call(builder, "llvm.x86.avx512.permvar.qi.512", octets, table, index)
    return builder.sub(units, builder.and_(builder.bitcast(bend, units.type), constant(255, 2 * LANES, I16)))


def _call(builder, name: str, result, *args):
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), args)
