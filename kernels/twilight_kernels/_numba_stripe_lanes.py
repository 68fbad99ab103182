"""Passes over the weights ``[blocks, keys, 64]`` of sampled rows, in LLVM IR: normalizing, judging a bar."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._numba_ir import F32, I32, I64, LANES, Loop, element, int64, literals, load, splat, store, zeros

_LINE = 256  # bytes of a key's 64 lanes
_FAST = ("fast",)


@intrinsic
def normalize_rows(typingctx, lanes, weights, keys, factor, mass):
    """Multiply each lane of ``weights [keys, 64]`` by its ``factor [64]``; add the sum over lanes to ``mass [keys]``.

    Literal: ``lanes`` (a multiple of 16), the first of the 64 that are touched. All others are addresses of float32.
    """
    (lanes_,) = literals(lanes)

    def codegen(context, builder, _signature, args):
        weights, keys, factor, mass = args[1:]
        vector = ir.VectorType(F32, LANES)
        lanes = [int64(4 * at) for at in range(0, lanes_, LANES)]
        factors = [load(builder, builder.add(factor, at), vector, 4) for at in lanes]
        kind = ir.FunctionType(F32, [F32, vector])
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        reduce = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        loop = Loop(builder, keys, [])
        row, total = element(builder, weights, loop.index, _LINE), None
        for at, by in zip(lanes, factors):
            place = builder.add(row, at)
            scaled = builder.fmul(load(builder, place, vector, 4), by, flags=_FAST)
            store(builder, scaled, place)
            total = scaled if total is None else builder.fadd(total, scaled, flags=_FAST)
        place = element(builder, mass, loop.index, 4)
        summed = builder.call(reduce, [load(builder, place, F32), total], fastmath=_FAST)
        store(builder, summed, place)
        loop.close([])
        return context.get_dummy_value()

    return types.void(lanes, *(types.int64,) * 4), codegen


@intrinsic
def add_rows(typingctx, lanes, weights, keys, total):
    """Add the rows of ``weights [keys, 64]`` to ``total [64]``, addresses of float32; ``lanes`` as above."""
    (lanes_,) = literals(lanes)

    def codegen(context, builder, _signature, args):
        weights, keys, total = args[1:]
        vector = ir.VectorType(F32, LANES)
        places = [builder.add(total, int64(4 * at)) for at in range(0, lanes_, LANES)]
        loop = Loop(builder, keys, [load(builder, place, vector, 4) for place in places])
        row = element(builder, weights, loop.index, _LINE)
        rows = [load(builder, builder.add(row, int64(4 * at)), vector, 4) for at in range(0, lanes_, LANES)]
        loop.close([builder.fadd(a, b, flags=_FAST) for a, b in zip(loop.values, rows)])
        for place, value in zip(places, loop.values):
            store(builder, value, place)
        return context.get_dummy_value()

    return types.void(lanes, *(types.int64,) * 3), codegen


@intrinsic
def keep_columns(typingctx, heads, samples, weights, block_bytes, mass, listed, count, own_share, bar, kept):
    """Add to ``kept`` each lane's weights of the listed keys whose mass without the lane's own row reaches ``bar``.

    ``own_share`` is 1, or 0 where a lone row has no others to be judged by.

    Literals: ``heads`` and ``samples`` (a multiple of 16), whose product is the number of lanes.
    Addresses of float32: ``weights [blocks, keys, 64]``, ``block_bytes`` from block to block; ``mass [keys]``;
    ``kept [blocks * 64]``. ``listed``: address of int32 ``[count]``.
    """
    heads_, samples_ = literals(heads, samples)
    signature = types.void(heads, samples, *(types.int64,) * 5, types.float32, types.float32, types.int64)

    def codegen(context, builder, _signature, args):
        weights, block_bytes, mass, listed, count, own_share, bar, kept = args[2:]
        vector, deep = ir.VectorType(F32, LANES), samples_ // LANES
        bars, shares = splat(builder, bar), splat(builder, own_share)
        lanes = [heads_first * samples_ + LANES * part for heads_first in range(heads_) for part in range(deep)]
        places = [builder.add(kept, int64(4 * lane)) for lane in lanes]
        loop = Loop(builder, count, [load(builder, place, vector, 4) for place in places])
        key = builder.sext(load(builder, element(builder, listed, loop.index, 4), I32), I64)
        total = splat(builder, load(builder, element(builder, mass, key, 4), F32))
        line, rows = builder.mul(key, int64(_LINE)), []
        for lane in lanes:
            block = builder.add(weights, builder.mul(block_bytes, int64(lane // 64)))
            rows.append(load(builder, builder.add(builder.add(block, line), int64(4 * (lane % 64))), vector, 4))
        inside = []
        for part in range(deep):
            own = rows[part]
            for head in range(1, heads_):
                own = builder.fadd(own, rows[head * deep + part], flags=_FAST)
            own = builder.fmul(own, shares, flags=_FAST)
            inside.append(builder.fcmp_ordered(">=", builder.fsub(total, own, flags=_FAST), bars))
        nothing = zeros(LANES)
        loop.close([
            builder.fadd(old, builder.select(inside[n % deep], row, nothing), flags=_FAST)
            for n, (old, row) in enumerate(zip(loop.values, rows))
        ])  # fmt: skip
        for place, value in zip(places, loop.values):
            store(builder, value, place)
        return context.get_dummy_value()

    return signature, codegen
