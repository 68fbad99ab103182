"""Matrix tiles of Intel CPUs (AMX): bfloat16 products summed in float32, sixteen times what vectors do.

A tile holds 16 rows of 64 bytes. Tiles are named by number in the instructions and configured a thread and task;
``tiles_off`` gives them back, so that nobody finds another's configuration.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._numba_ir import I8, Loop, int64, literals, load

_PERMISSION, _TILE_DATA = 0x1023, 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
_ARCH_PRCTL = 158
_ROW_BYTES = 64
_LINE_BYTES = 256  # 64 float32, or as many pairs of bfloat16
_CONFIG = np.zeros(64, np.uint8)  # palette 1, eight tiles of 16 rows x 64 bytes
_CONFIG[0] = 1
_CONFIG[16:32].view(np.uint16)[:] = _ROW_BYTES
_CONFIG[48:56] = 16
CONFIG_ADDRESS = int(_CONFIG.ctypes.data)


@cache
def has_tiles(product: str = "bf16") -> bool:
    """Whether this process may use tiles of bfloat16, or of bytes (``int8``): Linux grants them on request."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    if not llvm.get_host_cpu_features().get(f"amx-{product}", False):
        return False
    return int(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _PERMISSION, _TILE_DATA)) == 0


@intrinsic
def tiles_on(typingctx, config):
    """Configure this thread's tiles from ``CONFIG_ADDRESS``."""

    def codegen(context, builder, _signature, args):
        _emit(builder, "ldtilecfg", _pointer(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def tiles_off(typingctx):
    """Give this thread's tiles back."""

    def codegen(context, builder, _signature, args):
        _emit(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def tile_product(typingctx, parts, is_added, a, a_stride, rows, pairs, b, c):
    """Set ``c[m, r] = sum_n a[m, n] * b[n, r]`` (or add it) for 64 r, with bfloat16 a, b and float32 c.

    Literals: ``parts``, 1, or 2 if a and b are sums of a high and a low part, of whose products that of the low ones is
    left out; ``is_added`` (0 or 1). ``rows`` is a multiple of 32, and so is ``2 * pairs``, the length of the sum.
    Addresses: ``a [parts, rows, >= 2 * pairs]``, ``a_stride`` bytes from row to row; ``b [parts, pairs, 64, 2]``,
    neighbours of n side by side; ``c [rows, 64]``.
    """
    parts_, added = literals(parts, is_added)
    signature = types.void(parts, is_added, *(types.int64,) * 6)

    def codegen(context, builder, _signature, args):
        a, a_stride, rows, pairs, b, c = args[2:]
        stride, steps = int64(_LINE_BYTES), builder.lshr(pairs, int64(4))
        a_low, b_low = builder.mul(rows, a_stride), builder.mul(pairs, stride)
        outer = Loop(builder, builder.lshr(rows, int64(5)), [])
        first = builder.mul(outer.index, int64(32))
        upper = builder.add(a, builder.mul(first, a_stride))
        lower = builder.add(upper, builder.mul(a_stride, int64(16)))
        for half in (0, 128):  # bytes of 32 rows r
            place = builder.add(builder.add(c, builder.mul(first, stride)), int64(half))
            corners = [builder.add(place, int64(offset)) for offset in (0, 64, 16 * _LINE_BYTES, 16 * _LINE_BYTES + 64)]
            for tile, corner in enumerate(corners):
                if added:
                    _load_tile(builder, tile, corner, stride)
                else:
                    _emit(builder, "tilezero", _tile(tile))
            loop = Loop(builder, steps, [])
            along = builder.mul(loop.index, int64(_ROW_BYTES))
            down = builder.add(builder.add(b, builder.mul(loop.index, int64(16 * _LINE_BYTES))), int64(half))
            ups, downs = (builder.add(upper, along), builder.add(lower, along)), (down, builder.add(down, int64(64)))
            if parts_ == 2:  # high by low, high by high, low by high: each is loaded once
                _load_pair(builder, 4, ups, a_stride)
                _load_pair(builder, 6, [builder.add(place, b_low) for place in downs], stride)
                _four_products(builder)
                _load_pair(builder, 6, downs, stride)
                _four_products(builder)
                _load_pair(builder, 4, [builder.add(place, a_low) for place in ups], a_stride)
            else:
                _load_pair(builder, 4, ups, a_stride)
                _load_pair(builder, 6, downs, stride)
            _four_products(builder)
            loop.close([])
            for tile, corner in enumerate(corners):
                _emit(builder, "tilestored64", _tile(tile), _pointer(builder, corner), stride)
        outer.close([])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def strip_product(typingctx, tiles, is_added, is_skipping, a, a_stride, steps, alive, b, b_stride, c, c_stride):
    """Set ``c[m, r] = sum_n a[m, n] * b[n, r]`` (or add it) for 16 m and ``16 * tiles`` r, as ``tile_product``.

    Literals: ``tiles``, at most 4; ``is_added``; ``is_skipping``: 1 leaves out those of the ``steps`` of 32 n whose
    byte at ``alive`` is 0: there every ``a`` must be zero. Addresses, and strides in bytes: ``a [16, 32 * steps]``,
    ``b [16 * steps, r, 2]``, ``c``.
    """
    tiles_, added, skipping = literals(tiles, is_added, is_skipping)
    signature = types.void(tiles, is_added, is_skipping, *(types.int64,) * 8)

    def codegen(context, builder, _signature, args):
        multiply_strip(builder, "tdpbf16ps", tiles_, added, skipping, *args[3:])
        return context.get_dummy_value()

    return signature, codegen


def multiply_strip(
    builder, product: str, tiles: int, added, skipping, a, a_stride, steps, alive, b, b_stride, c, c_stride
) -> None:
    """Emit ``strip_product``, by any tile instruction."""
    corners = [_pointer(builder, builder.add(c, int64(_ROW_BYTES * tile))) for tile in range(tiles)]
    for tile, corner in enumerate(corners):
        if added:
            _emit(builder, "tileloadd64", _tile(tile), corner, c_stride)
        else:
            _emit(builder, "tilezero", _tile(tile))
    loop = Loop(builder, steps, [])
    is_alive = ir.Constant(ir.IntType(1), 1)
    if skipping:
        flag = load(builder, builder.add(alive, loop.index), I8)
        is_alive = builder.icmp_unsigned("!=", flag, ir.Constant(I8, 0))
    with builder.if_then(is_alive):
        along = builder.add(a, builder.mul(loop.index, int64(_ROW_BYTES)))
        down = builder.add(b, builder.mul(loop.index, builder.mul(b_stride, int64(16))))
        _emit(builder, "tileloadd64", _tile(4), _pointer(builder, along), a_stride)
        for tile in range(tiles):
            place = builder.add(down, int64(_ROW_BYTES * tile))
            _emit(builder, "tileloadd64", _tile(5 + tile % 3), _pointer(builder, place), b_stride)
            _emit(builder, product, _tile(tile), _tile(4), _tile(5 + tile % 3))
    loop.close([])
    for tile, corner in enumerate(corners):
        _emit(builder, "tilestored64", _tile(tile), corner, c_stride)


def _load_pair(builder, tile: int, places, stride) -> None:
    for number, place in enumerate(places):
        _load_tile(builder, tile + number, place, stride)


def _load_tile(builder, tile: int, place, stride) -> None:
    _emit(builder, "tileloadd64", _tile(tile), _pointer(builder, place), stride)


def _four_products(builder) -> None:
    """Add tiles 4 and 5 by tiles 6 and 7 to tiles 0 to 3."""
    for tile in range(4):
        _emit(builder, "tdpbf16ps", _tile(tile), _tile(4 + tile // 2), _tile(6 + tile % 2))


def _emit(builder, name: str, *args) -> None:
    """Call one of LLVM's tile instructions."""
    full = f"llvm.x86.{name}"
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(builder.module.globals.get(full) or ir.Function(builder.module, kind, full), args)


def _tile(number: int):
    return ir.Constant(I8, number)


def _pointer(builder, address):
    return builder.inttoptr(address, I8.as_pointer())
