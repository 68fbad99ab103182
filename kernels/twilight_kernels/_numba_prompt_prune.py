"""Top-p pruning of weights on CPUs: the smallest weight that a row of a prompt keeps.

As ``_numba_prune`` does it on logits. Tokens lighter than ``slack / count`` together weigh less than the slack, so only
the others are looked at; the interval of the limit is then cut by trials, in the order of the numbers' bits, which for
positive ones is their own, and after each round only what is still undecided is carried on.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._numba_ir import F32, LANES, Loop, constant, element, int64, load, splat, store, zeros
from ._numba_numbers import bits_float, fast, float_bits
from ._numba_prompt_lanes import lanes_in, sum_of_lanes

SMALLEST = np.float32(2.0**-100)  # below every weight that is not zero
_NOTHING = np.float32(3.0e38)  # above every weight
_FEW = 64  # weights for which sixteen limits at once are cheaper than one after the other
_HALVINGS = 4


@fast
def smallest_kept(row, vectors, top, least, slack, need, min_keep, near, trials):
    """Find the weight from which a row's tokens carry ``need`` and are at least ``min_keep``, or all that weigh.

    Args:
        row: address of ``16 * vectors`` weights.
        top: the largest of them; ``least``: a weight that at least 16 of them reach.
        slack: what tokens may weigh that are left out, all of them less ``need``.
        near: float32 ``[16 * vectors + 16]``, trials: float32 ``[3, 16]``, both for use here.
    """
    if need <= 0 and min_keep <= 0:
        return _NOTHING
    start = _NOTHING
    if need > 0:
        start = slack / np.float32(LANES * vectors)
    if min_keep > 0:
        start = min(start, least)
    start = max(min(start, top), SMALLEST)
    found = gather_between(row, vectors, start, _NOTHING, near.ctypes.data)
    while found < min_keep and start > SMALLEST:
        start = max(start * np.float32(1 / 16), SMALLEST)
        found = gather_between(row, vectors, start, _NOTHING, near.ctypes.data)
    low, high = np.int64(float_bits(start)), np.int64(float_bits(top)) + 1
    sure_mass, sure_count = np.float32(0), np.float32(0)
    while found > 1 and high - low > 1:
        filled = (found + LANES - 1) // LANES
        if found > _FEW:
            for _ in range(_HALVINGS):
                middle = (low + high) // 2
                mass, count = above(near.ctypes.data, filled, bits_float(np.uint32(middle)))
                if sure_mass + mass >= need and sure_count + count >= min_keep:
                    low = middle
                else:
                    high = middle
        else:
            low, high = _try_sixteen(near, found, low, high, need - sure_mass, min_keep - sure_count, trials)
        upper = bits_float(np.uint32(high))
        mass, count = above(near.ctypes.data, filled, upper)
        # what reaches the upper limit is kept whatever follows; what is below the lower one never
        sure_mass += mass
        sure_count += count
        found = gather_between(near.ctypes.data, filled, bits_float(np.uint32(low)), upper, near.ctypes.data)
    return bits_float(np.uint32(low))


@fast
def _try_sixteen(near, found, low, high, need, min_keep, trials):
    """Cut the interval into seventeen; return the one in which the limit lies."""
    for i in range(LANES):
        trials[0, i] = bits_float(np.uint32(low + (high - low) * (i + 1) // (LANES + 1)))
    above_each(near.ctypes.data, found, trials.ctypes.data, trials[1].ctypes.data)
    passed = 0
    for i in range(LANES):
        passed += 1 if trials[1, i] >= need and trials[2, i] >= min_keep else 0
    lower = low if passed == 0 else np.int64(float_bits(trials[0, passed - 1]))
    upper = high if passed == LANES else np.int64(float_bits(trials[0, passed]))
    return lower, upper


@intrinsic
def above(typingctx, row, vectors, limit):
    """Return the sum and the number, as float32, of the ``16 * vectors`` numbers that reach ``limit``."""
    signature = types.UniTuple(types.float32, 2)(types.int64, types.int64, types.float32)

    def codegen(context, builder, signature, args):
        row, vectors, limit = args[0], args[1], splat(builder, args[2])
        loop = Loop(builder, vectors, [zeros(LANES), zeros(LANES)])
        numbers = load(builder, element(builder, row, loop.index, 4 * LANES), ir.VectorType(F32, LANES), 4)
        reaches = builder.fcmp_ordered(">=", numbers, limit)
        added = [builder.select(reaches, x, zeros(LANES)) for x in (numbers, constant(1.0, LANES))]
        loop.close([builder.fadd(total, x) for total, x in zip(loop.values, added)])
        pair = [sum_of_lanes(builder, total) for total in loop.values]
        return context.make_tuple(builder, signature.return_type, pair)

    return signature, codegen


@intrinsic
def above_each(typingctx, row, count, limits, out):
    """Write the sums and the numbers, float32 ``out [2, 16]``, of ``count`` numbers that reach each of 16 limits."""

    def codegen(context, builder, _signature, args):
        row, count, limits, out = args
        limits = load(builder, limits, ir.VectorType(F32, LANES), 4)
        loop = Loop(builder, count, [zeros(LANES), zeros(LANES)])
        number = splat(builder, load(builder, element(builder, row, loop.index, 4), F32))
        reaches = builder.fcmp_ordered(">=", number, limits)
        added = [builder.select(reaches, x, zeros(LANES)) for x in (number, constant(1.0, LANES))]
        loop.close([builder.fadd(total, x) for total, x in zip(loop.values, added)])
        for place, total in enumerate(loop.values):
            store(builder, total, builder.add(out, int64(4 * LANES * place)))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), codegen


@intrinsic
def gather_between(typingctx, row, vectors, low, high, out):
    """Copy those of ``16 * vectors`` numbers that are at least ``low`` and below ``high``; return how many.

    The target may be the row itself; behind what is copied, up to sixteen zeros are written.
    """

    def codegen(context, builder, _signature, args):
        row, vectors, out = args[0], args[1], args[4]
        low, high = splat(builder, args[2]), splat(builder, args[3])
        kind = ir.VectorType(F32, LANES)
        loop = Loop(builder, vectors, [int64(0)])
        numbers = load(builder, element(builder, row, loop.index, 4 * LANES), kind, 4)
        inside = builder.and_(builder.fcmp_ordered(">=", numbers, low), builder.fcmp_ordered("<", numbers, high))
        name = "llvm.x86.avx512.mask.compress.v16f32"
        signature = ir.FunctionType(kind, [kind, kind, inside.type])
        compress = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
        packed = builder.call(compress, [numbers, zeros(LANES), inside])
        store(builder, packed, element(builder, out, loop.values[0], 4))
        loop.close([builder.add(loop.values[0], lanes_in(builder, inside))])
        store(builder, zeros(LANES), element(builder, out, loop.values[0], 4))
        return loop.values[0]

    return types.int64(types.int64, types.int64, types.float32, types.float32, types.int64), codegen
