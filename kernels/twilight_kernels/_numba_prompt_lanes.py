"""Vector code over the rows of logits that tiles leave, on CPUs: largest logits, weights, what a row keeps.

A row's columns lie in the vector lanes. *Weights* are ``exp(logit - peak)``, float32; those below 2^-80 are zero, which
no sum that holds a 1 can see. They take the place of the logits, and once it is known which are kept, their bfloat16
forms take the place of the first half of them, where matrix tiles read them.
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
    splat,
    store,
    zeros,
)
from ._numba_numbers import exact
from ._numba_strips import EXP2

_ROUND = 12582912.0  # 1.5 * 2^23: added to a small number, leaves its nearest integer in the last bits
_FAINT = -80.0  # the binary logarithm below which a weight is zero
_CONTRACT = ("contract",)


@intrinsic
def raise_tops(typingctx, vectors, rows, address, row_bytes, tops):
    """Raise each lane of ``tops [rows, 16]`` to the largest of the rows' ``16 * vectors`` numbers in that lane.

    Literal: ``vectors``. Addresses of float32: the first row, ``row_bytes`` from row to row; ``tops``.
    """
    (vectors_,) = literals(vectors)

    def codegen(context, builder, _signature, args):
        _, rows, address, row_bytes, tops = args
        vector = ir.VectorType(F32, LANES)
        loop = Loop(builder, rows, [])
        row = builder.add(address, builder.mul(loop.index, row_bytes))
        found = [load(builder, builder.add(row, int64(4 * LANES * v)), vector, 4) for v in range(vectors_)]
        place = element(builder, tops, loop.index, 4 * LANES)
        found.append(load(builder, place, vector, 4))
        while len(found) > 1:
            found = [*found[2:], larger(builder, found[0], found[1])]
        store(builder, found[0], place)
        loop.close([])
        return context.get_dummy_value()

    return types.void(vectors, types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def range_of_lanes(typingctx, address):
    """Return the largest and the smallest of sixteen float32 numbers."""
    signature = types.UniTuple(types.float32, 2)(types.int64)

    def codegen(context, builder, signature, args):
        high = low = load(builder, args[0], ir.VectorType(F32, LANES), 4)
        for half in (8, 4, 2, 1):
            high = larger(builder, high, rotated(builder, high, half))
            other = rotated(builder, low, half)
            low = builder.select(builder.fcmp_ordered("<", other, low), other, low)
        first = ir.Constant(I32, 0)
        pair = [builder.extract_element(vector, first) for vector in (high, low)]
        return context.make_tuple(builder, signature.return_type, pair)

    return signature, codegen


@exact  # fast maths would cancel what rounds to the nearest integer
def weigh_row(row, vectors, factor, peak):
    """Turn ``16 * vectors`` logits into weights ``2 ** ((logit - peak) * factor)``; return their sum."""
    return _weigh_row(row, vectors, factor, peak)


@exact
def weight_of(logit, factor, peak):
    """Return the weight that ``weigh_row`` gives one logit."""
    return _weight_of(logit, factor, peak)


@intrinsic
def _weigh_row(typingctx, row, vectors, factor, peak):

    def codegen(context, builder, _signature, args):
        row, vectors, factor, peak = args
        factor, peak = splat(builder, factor), splat(builder, peak)
        loop = Loop(builder, vectors, [zeros(LANES)])
        place = element(builder, row, loop.index, 4 * LANES)
        below = builder.fsub(load(builder, place, ir.VectorType(F32, LANES), 4), peak)
        weight = _exp2(builder, builder.fmul(below, factor))
        store(builder, weight, place)
        loop.close([builder.fadd(loop.values[0], weight)])
        return sum_of_lanes(builder, loop.values[0])

    return types.float32(types.int64, types.int64, types.float32, types.float32), codegen


@exact
def sum_of_weights(row, vectors, factor, peak):
    """Return the sum of the weights that ``weigh_row`` gives, and leave the logits."""
    return _sum_of_weights(row, vectors, factor, peak)


@intrinsic
def _sum_of_weights(typingctx, row, vectors, factor, peak):

    def codegen(context, builder, _signature, args):
        row, vectors, factor, peak = args
        factor, peak = splat(builder, factor), splat(builder, peak)
        loop = Loop(builder, vectors, [zeros(LANES)])
        logits = load(builder, element(builder, row, loop.index, 4 * LANES), ir.VectorType(F32, LANES), 4)
        weight = _exp2(builder, builder.fmul(builder.fsub(logits, peak), factor))
        loop.close([builder.fadd(loop.values[0], weight)])
        return sum_of_lanes(builder, loop.values[0])

    return types.float32(types.int64, types.int64, types.float32, types.float32), codegen


@intrinsic
def _weight_of(typingctx, logit, factor, peak):

    def codegen(context, builder, _signature, args):
        logit, factor, peak = (splat(builder, arg) for arg in args)
        weight = _exp2(builder, builder.fmul(builder.fsub(logit, peak), factor))
        return builder.extract_element(weight, ir.Constant(I32, 0))

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def keep_columns(typingctx, heads, first, head_bytes, pairs, target, limits, sums, own, alive):
    """Keep the weights of a row that reach the limit of some query head, as bfloat16; return how many columns.

    Literal: ``heads``. Addresses: float32 weights ``first`` of the first head, ``head_bytes`` from head to head,
    ``32 * pairs`` of them; ``target``, of bfloat16, likewise, not behind ``first``; ``limits`` float32 ``[heads]``,
    positive; ``sums`` float32 ``[heads, 16]``, to which the weights are added; ``own`` int64 ``[heads]``, to which
    those are counted that reach the head's own limit; ``alive`` uint8 ``[pairs]``, set where something is kept.
    """
    (heads_,) = literals(heads)

    def codegen(context, builder, _signature, args):
        _, first, head_bytes, pairs, target, limits, sums, own, alive = args
        vector = ir.VectorType(F32, LANES)
        limit = [splat(builder, load(builder, builder.add(limits, int64(4 * g)), F32)) for g in range(heads_)]
        places = [builder.add(sums, int64(4 * LANES * g)) for g in range(heads_)]
        counters = [builder.add(own, int64(8 * g)) for g in range(heads_)]
        carried = [load(builder, place, vector, 4) for place in places]
        carried += [load(builder, counter, I64) for counter in counters] + [int64(0)]
        loop = Loop(builder, pairs, carried)
        totals, counts = loop.values[:heads_], loop.values[heads_:-1]
        halves, unions = [], []
        for half in range(2):
            at = builder.add(element(builder, first, loop.index, 8 * LANES), int64(4 * LANES * half))
            rows = [load(builder, builder.add(at, builder.mul(head_bytes, int64(g))), vector, 4) for g in range(heads_)]
            masks = [builder.fcmp_ordered(">=", row, bound) for row, bound in zip(rows, limit)]
            counts = [builder.add(count, lanes_in(builder, mask)) for count, mask in zip(counts, masks)]
            union = masks[0]
            for mask in masks[1:]:
                union = builder.or_(union, mask)
            unions.append(union)
            rows = [builder.select(union, row, zeros(LANES)) for row in rows]
            totals = [builder.fadd(total, row) for total, row in zip(totals, rows)]
            halves.append(rows)
        for g, (even, odd) in enumerate(zip(*halves)):
            place = builder.add(target, builder.mul(head_bytes, int64(g)))
            store(builder, _bfloats(builder, even, odd), element(builder, place, loop.index, 4 * LANES), 2)
        kept = builder.add(lanes_in(builder, unions[0]), lanes_in(builder, unions[1]))
        flag = builder.add(alive, loop.index)
        is_alive = builder.zext(builder.icmp_signed(">", kept, int64(0)), I8)
        store(builder, builder.or_(load(builder, flag, I8, 1), is_alive), flag, 1)
        loop.close([*totals, *counts, builder.add(loop.values[-1], kept)])
        for place, total in zip(places, loop.values):
            store(builder, total, place)
        for counter, count in zip(counters, loop.values[heads_:-1]):
            store(builder, count, counter)
        return loop.values[-1]

    return types.int64(heads, *(types.int64,) * 8), codegen


@intrinsic
def sum_of_row(typingctx, address):
    """Return the sum of sixteen float32 numbers."""

    def codegen(context, builder, _signature, args):
        return sum_of_lanes(builder, load(builder, args[0], ir.VectorType(F32, LANES), 4))

    return types.float32(types.int64), codegen


def sum_of_lanes(builder, vector):
    """Sum of a vector's lanes, in one fixed order."""
    for half in (8, 4, 2, 1):
        vector = builder.fadd(vector, rotated(builder, vector, half))
    return builder.extract_element(vector, ir.Constant(I32, 0))


def lanes_in(builder, mask):
    """Lanes in a mask of sixteen."""
    return builder.zext(builder.ctpop(builder.bitcast(mask, I16)), I64)


def _exp2(builder, x):
    """``2 ** x`` for ``x <= 0``, zero below ``_FAINT``."""
    is_seen = builder.fcmp_ordered(">=", x, constant(_FAINT, LANES))
    shifted = builder.fadd(x, constant(_ROUND, LANES))
    rest = builder.fsub(x, builder.fsub(shifted, constant(_ROUND, LANES)))
    y = constant(EXP2[5][0], LANES)
    for coefficient in EXP2[5][1:]:
        product = builder.fmul(y, rest, flags=_CONTRACT)
        y = builder.fadd(product, constant(coefficient, LANES), flags=_CONTRACT)
    bits = ir.VectorType(I32, LANES)
    octave = builder.shl(builder.bitcast(shifted, bits), constant(23, LANES, I32))
    found = builder.bitcast(builder.add(builder.bitcast(y, bits), octave), x.type)
    return builder.select(is_seen, found, zeros(LANES))


def _bfloats(builder, first, second):
    """Two vectors of positive numbers, rounded to bfloat16, one after the other."""
    bits, half = ir.VectorType(I32, LANES), constant(0x8000, LANES, I32)
    pair = [
        builder.bitcast(builder.add(builder.bitcast(x, bits), half), ir.VectorType(I16, 32)) for x in (first, second)
    ]
    order = ir.Constant(ir.VectorType(I32, 32), [2 * lane + 1 for lane in range(32)])
    return builder.shuffle_vector(*pair, order)
