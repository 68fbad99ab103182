"""Tiles of the CPU prefill kernels: query rows in the vector lanes, one matrix product in LLVM IR.

A *block* is 64 query rows of one query head, stored channel-major (``[D, 64]``), so that logits ``[key, row]``
need no horizontal sum, softmax runs down the columns, and a key or value is only ever broadcast: any list of
rows will do, contiguous or gathered.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, literally, types
from numba.extending import intrinsic

from ._numba_ir import (
    F32,
    I32,
    LANES,
    Loop,
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
from ._numba_numbers import LOWEST, f32_at, fast, i32_at, item_bytes, read_row

BLOCK = 64  # query rows of a block: four vectors
TILE = 64  # keys that are multiplied with at a time
_DEEP = 4  # rows of the product that share the loads of a vector: 4 x 4 accumulators
_FAST = ("fast",)


@intrinsic
def outer_product(typingctx, lanes, is_added, a, a_row, a_step, rows, steps, b, c):
    """Set ``c[m, r] = sum_n a[m * a_row + n * a_step] * b[n, r]`` (or add it) for ``rows`` m and ``steps`` n.

    Literals: ``lanes`` (a multiple of 16, at most 64), ``is_added`` (0 or 1).
    Addresses of float32: ``a``, strides in numbers; ``b [steps, 64]`` and ``c [rows, 64]``, of which the first
    ``lanes`` r are touched.
    """
    lanes_, added = literals(lanes, is_added)
    signature = types.void(lanes, is_added, *(types.int64,) * 7)

    def codegen(context, builder, _signature, args):
        a, a_row, a_step, rows, steps, b, c = args[2:]
        done = int64(0)
        for deep in (_DEEP, 1):
            first = done
            whole = builder.sdiv(builder.sub(rows, first), int64(deep))
            outer = Loop(builder, whole, [])
            row = builder.add(first, builder.mul(outer.index, int64(deep)))
            _rows_of_product(builder, lanes_ // LANES, added, deep, a, a_row, a_step, row, steps, b, c)
            outer.close([])
            done = builder.add(first, builder.mul(whole, int64(deep)))
        return context.get_dummy_value()

    return signature, codegen


def _rows_of_product(builder, vectors, added, deep, a, a_row, a_step, row, steps, b, c) -> None:
    vector, line = ir.VectorType(F32, LANES), 4 * BLOCK
    places = [
        builder.add(element(builder, c, builder.add(row, int64(m)), line), int64(4 * LANES * v))
        for m in range(deep)
        for v in range(vectors)
    ]
    initial = [load(builder, place, vector, 4) if added else zeros(LANES) for place in places]
    starts = [element(builder, a, builder.mul(builder.add(row, int64(m)), a_row), 4) for m in range(deep)]
    loop = Loop(builder, steps, initial)
    base = element(builder, b, loop.index, line)
    shared = [load(builder, builder.add(base, int64(4 * LANES * v)), vector, 4) for v in range(vectors)]
    offset = builder.mul(loop.index, builder.mul(a_step, int64(4)))
    new = []
    for m in range(deep):
        factor = splat(builder, load(builder, builder.add(starts[m], offset), F32))
        for v in range(vectors):
            product = builder.fmul(factor, shared[v], flags=_FAST)
            new.append(builder.fadd(loop.values[m * vectors + v], product, flags=_FAST))
    loop.close(new)
    for place, total in zip(places, loop.values):
        store(builder, total, place)


@fast
def gather_rows(kind, base, row_bytes, positions, count, dim, out):
    """Copy the rows ``positions`` (address of int32) of ``dim`` raw numbers to float32 ``out [count, dim]``."""
    literally(kind)
    listed = carray(i32_at(positions), (count,))
    for i in range(count):
        read_row(kind, base + row_bytes * listed[i], dim, out[i])


@fast
def hide_later(logits, positions, count, first_row):
    """Put logits ``[count, 64]`` (address) of keys behind a row's position out of the softmax; rows are neighbours."""
    listed, numbers = carray(i32_at(positions), (count,)), carray(f32_at(logits), (count, BLOCK))
    for i in range(count):
        hidden = min(listed[i] - first_row, BLOCK)
        for r in range(hidden):
            numbers[i, r] = LOWEST


@intrinsic
def softmax_tile(typingctx, parts, lanes, logits, out, count, scaling, top, total, shrink):
    """Turn unscaled logits ``[count, 64]`` into weights ``out`` below a running largest one.

    Literals: ``parts``; 0 for float32 weights, which may replace the logits. If 1, ``count`` is even, and row ``i``
    becomes the weights of keys ``2 i`` and ``2 i + 1``, bfloat16 side by side; if 2, what rounding left of them follows
    behind the last. ``lanes`` (a multiple of 16), the first of the 64 that are touched.
    Addresses of float32 ``[64]``: ``top`` and ``total``, the running largest logit and sum of weights, are updated;
    ``shrink`` is what the sum shrank by. Returns whether anything shrank.
    """
    parts_, lanes_ = literals(parts, lanes)
    paired, degree = parts_ > 0, 3 if parts_ == 1 else 5
    signature = types.boolean(parts, lanes, *(types.int64,) * 3, types.float32, *(types.int64,) * 3)

    def codegen(context, builder, _signature, args):
        logits, out, count, scaling, top, total, shrink = args[2:]
        vector = ir.VectorType(F32, LANES)
        lanes = [int64(4 * LANES * v) for v in range(lanes_ // LANES)]
        old = [load(builder, builder.add(top, at), vector, 4) for at in lanes]
        loop = Loop(builder, count, old)
        row = element(builder, logits, loop.index, 4 * BLOCK)
        rows = [load(builder, builder.add(row, at), vector, 4) for at in lanes]
        loop.close([larger(builder, new, largest) for new, largest in zip(rows, loop.values)])
        factor = splat(builder, builder.fmul(scaling, ir.Constant(F32, 1.4426950408889634), flags=_FAST))
        sums, moved = [], ir.Constant(ir.IntType(1), 0)
        for at, before, now in zip(lanes, old, loop.values):
            store(builder, now, builder.add(top, at))
            fewer = _exp2(builder, builder.fmul(builder.fsub(before, now, flags=_FAST), factor, flags=_FAST), 5)
            store(builder, fewer, builder.add(shrink, at))
            sums.append(builder.fmul(load(builder, builder.add(total, at), vector, 4), fewer, flags=_FAST))
            mask = builder.bitcast(builder.fcmp_ordered("<", before, now), ir.IntType(LANES))
            moved = builder.or_(moved, builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0)))
        deep, tops = 2 if paired else 1, loop.values
        loop = Loop(builder, builder.lshr(count, int64(1)) if paired else count, sums)
        source = element(builder, logits, loop.index, 4 * BLOCK * deep)
        target, sums = element(builder, out, loop.index, 4 * BLOCK), []
        low = builder.mul(count, int64(2 * BLOCK))  # bytes from the high parts to the low ones
        for at, largest, summed in zip(lanes, tops, loop.values):
            found = []
            for n in range(deep):
                place = builder.add(builder.add(source, at), int64(4 * BLOCK * n))
                # not reassociated: logits are large, their differences are not
                below = builder.fsub(load(builder, place, vector, 4), largest)
                found.append(_exp2(builder, builder.fmul(below, factor), degree))
                summed = builder.fadd(summed, found[-1], flags=_FAST)
            place, weight = builder.add(target, at), _side_by_side(builder, *found) if paired else found[0]
            store(builder, weight, place)
            if parts_ == 2:
                store(builder, _side_by_side(builder, *_rests(builder, weight, *found)), builder.add(place, low))
            sums.append(summed)
        loop.close(sums)
        for at, summed in zip(lanes, loop.values):
            store(builder, summed, builder.add(total, at))
        return moved

    return signature, codegen


# 2 ** x on [-1/2, 1/2], highest power first: degree 5 to 1e-7, degree 3 to 1e-4, which
# bfloat16 cannot tell from exact
EXP2 = {
    5: (1.327647088e-3, 9.675541622e-3, 5.55071328e-2, 2.402211972e-1, 6.931469671e-1, 1.000000072),
    3: (5.5171669e-2, 2.4261113e-1, 6.9326099e-1, 9.9992806e-1),
}


def _exp2(builder, x, degree: int):
    """``2 ** x`` for ``x <= 0``; below -87 it stays there, as ``fast_exp`` does and for its reason."""
    x = larger(builder, x, constant(-87.0, LANES))
    name = f"llvm.rint.v{LANES}f32"
    kind = ir.FunctionType(x.type, [x.type])
    rint = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    whole = builder.call(rint, [x])
    rest, coefficients = builder.fsub(x, whole, flags=_FAST), EXP2[degree]
    y = constant(coefficients[0], LANES)
    for coefficient in coefficients[1:]:
        y = builder.fadd(builder.fmul(y, rest, flags=_FAST), constant(coefficient, LANES), flags=_FAST)
    bits = ir.VectorType(I32, LANES)
    octave = builder.shl(builder.fptosi(whole, bits), constant(23, LANES, I32))
    return builder.bitcast(builder.add(builder.bitcast(y, bits), octave), x.type)


def _rests(builder, paired, even, odd):
    """What rounding to the bfloat16 numbers in the halves of one vector left of two."""
    bits = builder.bitcast(paired, ir.VectorType(I32, LANES))
    low = builder.bitcast(builder.shl(bits, constant(16, LANES, I32)), even.type)
    high = builder.bitcast(builder.and_(bits, constant(-65536, LANES, I32)), even.type)
    return builder.fsub(even, low), builder.fsub(odd, high)


def _side_by_side(builder, even, odd):
    """Two vectors of numbers, rounded to bfloat16, in the halves of one."""
    bits = ir.VectorType(I32, LANES)
    half = constant(0x8000, LANES, I32)
    low = builder.lshr(builder.add(builder.bitcast(even, bits), half), constant(16, LANES, I32))
    high = builder.and_(builder.add(builder.bitcast(odd, bits), half), constant(-65536, LANES, I32))
    return builder.bitcast(builder.or_(low, high), even.type)


@fast
def shrink_rows(out, dim, shrink):
    """Multiply ``out [dim, 64]`` by a factor a lane, ``shrink [64]`` (addresses)."""
    rows, factors = carray(f32_at(out), (dim, BLOCK)), carray(f32_at(shrink), (BLOCK,))
    for d in range(dim):
        for r in range(BLOCK):
            rows[d, r] *= factors[r]


@fast
def pack_block(kind, query, row_stride, count, dim, out):
    """Write ``count`` query rows channel-major to ``out [dim, 64]``; absent rows are zero."""
    literally(kind)
    row = np.empty(dim, np.float32)
    out[:, count:] = 0
    for r in range(count):
        read_row(kind, query + item_bytes(kind) * row_stride * r, dim, row)
        for d in range(dim):
            out[d, r] = row[d]
