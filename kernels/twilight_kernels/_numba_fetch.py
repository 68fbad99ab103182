"""Asking for memory before it is read, on CPUs: what lies scattered the hardware cannot foresee."""

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

from ._numba_ir import I64, Loop, element, int64, load, prefetch

_LINE = 64  # bytes of a cache line


@intrinsic
def fetch_row(typingctx, address, num_bytes):
    """Ask for ``num_bytes`` from an address on."""

    def codegen(context, builder, _signature, args):
        _fetch(builder, *args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def fetch_rows(typingctx, address, rows, count, row_bytes):
    """Ask for the rows, ``row_bytes`` each, whose numbers are the ``count`` int64 at the address ``rows``."""

    def codegen(context, builder, _signature, args):
        address, rows, count, row_bytes = args
        loop = Loop(builder, count, [])
        row = load(builder, element(builder, rows, loop.index, 8), I64)
        _fetch(builder, builder.add(address, builder.mul(row, row_bytes)), row_bytes)
        loop.close([])
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), codegen


def _fetch(builder, address, num_bytes) -> None:
    lines = builder.lshr(builder.add(num_bytes, int64(_LINE - 1)), int64(6))
    loop = Loop(builder, lines, [])
    prefetch(builder, element(builder, address, loop.index, _LINE))
    loop.close([])
