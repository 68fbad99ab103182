"""Transposing 32-bit numbers in blocks of 16 x 16, in LLVM IR: storing one by one takes four times as long."""

from __future__ import annotations

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from ._numba_ir import I32, LANES, int64, load, store
from ._numba_numbers import fast, i32_at


@fast
def transpose(source, source_bytes, rows, columns, target, target_bytes):
    """Write ``target[c, r] = source[r, c]`` of 32-bit numbers; addresses, and bytes from row to row of each.

    The rows are filled up to a multiple of 16 with the last one: rows of the target must have room for that.
    """
    whole = columns // LANES * LANES
    for r in range(0, rows, LANES):
        last = min(LANES, rows - r) - 1
        for c in range(0, whole, LANES):
            _transpose_block(
                source + r * source_bytes + 4 * c, source_bytes, last, target + c * target_bytes + 4 * r, target_bytes
            )
        for c in range(whole, columns):
            out = carray(i32_at(target + c * target_bytes + 4 * r), (LANES,))
            for n in range(LANES):
                out[n] = carray(i32_at(source + (r + min(n, last)) * source_bytes), (columns,))[c]


@intrinsic
def _transpose_block(typingctx, source, source_bytes, last, target, target_bytes):
    """Transpose 16 x 16 numbers; rows of the source after ``last`` are that one again."""

    def codegen(context, builder, _signature, args):
        source, source_bytes, last, target, target_bytes = args
        vector, rows = ir.VectorType(I32, LANES), []
        for n in range(LANES):
            row = builder.select(builder.icmp_signed("<", int64(n), last), int64(n), last)
            rows.append(load(builder, builder.add(source, builder.mul(row, source_bytes)), vector, 4))
        for step in (8, 4, 2, 1):  # swap the off-diagonal quarters of ever smaller squares
            low = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
            high = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
            orders = [ir.Constant(vector, order) for order in (low, high)]
            for n in range(LANES):
                if not n & step:
                    a, b = rows[n], rows[n + step]
                    rows[n], rows[n + step] = (builder.shuffle_vector(a, b, order) for order in orders)
        for n, row in enumerate(rows):
            store(builder, row, builder.add(target, builder.mul(int64(n), target_bytes)))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 5), codegen
