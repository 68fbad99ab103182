"""Numbers in memory as the CPU kernels see them: int64 addresses, stored dtypes, atomics, a fast exponential.

*kind* is how numbers are stored: 2, 3, 4, 8 are packed codes of that many bits; ``RAW_F32``, ``RAW_BF16`` and
``RAW_F16`` are raw numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

RAW_BF16, RAW_F16, RAW_F32 = 16, 17, 32
RAW_KIND = {torch.float32: RAW_F32, torch.bfloat16: RAW_BF16, torch.float16: RAW_F16}
ITEM_BYTES = {RAW_F32: 4, RAW_BF16: 2, RAW_F16: 2}
LOWEST = np.float32(-3.0e38)  # stands for -inf, which fast maths may not see
ANY = 1 << 40  # length of a view whose bounds the caller knows

# helpers of a worker carry their own flags: fast maths lets sums vectorize, numpy's error model drops checks
_OPTIONS = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
fast = njit(fastmath=True, **_OPTIONS)
inlined = njit(fastmath=True, inline="always", **_OPTIONS)
# no reordering, no fused multiply-add, NaN and infinity as in IEEE 754; unsaid, the caller's flags would hold
exact = njit(fastmath=False, **_OPTIONS)

_I16, _I32, _I64 = (ir.IntType(n) for n in (16, 32, 64))
_F32, _HALF = ir.FloatType(), ir.HalfType()


@inlined
def item_bytes(kind):
    """Bytes of a raw number."""
    return 4 if kind == RAW_F32 else 2


@exact
def read_number(kind, address, index):
    """Read one raw number as float32."""
    if kind == RAW_F32:
        return carray(f32_at(address), (ANY,))[index]
    bits = carray(u16_at(address), (ANY,))[index]
    if kind == RAW_F16:
        return half_to_float(bits)
    return bits_float(np.uint32(bits) << np.uint32(16))


@exact
def write_number(kind, address, index, number):
    """Write one raw number, rounded to nearest even."""
    if kind == RAW_F32:
        carray(f32_at(address), (ANY,))[index] = number
    elif kind == RAW_F16:
        carray(u16_at(address), (ANY,))[index] = float_to_half(number)
    else:
        carray(u16_at(address), (ANY,))[index] = _bfloat(number)


@exact
def read_row(kind, address, count, out):
    """Read ``count`` neighbouring raw numbers as float32, in a loop for each kind."""
    if kind == RAW_F32:
        numbers = carray(f32_at(address), (ANY,))
        for i in range(count):
            out[i] = numbers[i]
    elif kind == RAW_F16:
        halves = carray(u16_at(address), (ANY,))
        for i in range(count):
            out[i] = half_to_float(halves[i])
    else:
        bits = carray(u16_at(address), (ANY,))
        for i in range(count):
            out[i] = bits_float(np.uint32(bits[i]) << np.uint32(16))


@exact
def write_row(kind, address, count, row):
    """Write ``count`` neighbouring raw numbers, rounded to nearest even."""
    if kind == RAW_F32:
        numbers = carray(f32_at(address), (ANY,))
        for i in range(count):
            numbers[i] = row[i]
    elif kind == RAW_F16:
        halves = carray(u16_at(address), (ANY,))
        for i in range(count):
            halves[i] = float_to_half(row[i])
    else:
        bits = carray(u16_at(address), (ANY,))
        for i in range(count):
            bits[i] = _bfloat(row[i])


@inlined
def _bfloat(number):
    bits = float_bits(number)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@fast
def aligned(num_bytes):
    """Uninitialized bytes that begin with a cache line: vectors and tiles that straddle two take twice as long."""
    room = np.empty(num_bytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + num_bytes]


@inlined
def fast_exp(x):
    """``exp(x)`` for ``x <= 0`` to about 2 ulp, branch-free so that loops over it vectorize (Cephes expf).

    Below -60 it stays at 1e-26, far under what a float32 sum that holds a 1 can see: a smaller weight would
    make its products denormal, which costs a hundred cycles each.
    """
    x = max(x, np.float32(-60.0))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1.0)
    return y * bits_float(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))


@intrinsic
def fetch_add(typingctx, address, amount):
    """Add ``amount`` to the int64 at ``address`` atomically; return what was there before."""

    def codegen(context, builder, _signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def fetch_max(typingctx, address, number):
    """Raise the int64 at ``address`` to ``number`` atomically; return what was there before."""

    def codegen(context, builder, _signature, args):
        return builder.atomic_rmw("max", builder.inttoptr(args[0], _I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def half_to_float(typingctx, bits):
    """Convert float16 bits (uint16) to float32."""

    def codegen(context, builder, _signature, args):
        return builder.fpext(builder.bitcast(args[0], _HALF), _F32)

    return types.float32(types.uint16), codegen


@intrinsic
def float_to_half(typingctx, number):
    """Convert float32 to float16 bits (uint16), to nearest even."""

    def codegen(context, builder, _signature, args):
        return builder.bitcast(builder.fptrunc(args[0], _HALF), _I16)

    return types.uint16(types.float32), codegen


@intrinsic
def float_bits(typingctx, number):
    """Reinterpret float32 as uint32."""

    def codegen(context, builder, _signature, args):
        return builder.bitcast(args[0], _I32)

    return types.uint32(types.float32), codegen


@intrinsic
def bits_float(typingctx, bits):
    """Reinterpret uint32 as float32."""

    def codegen(context, builder, _signature, args):
        return builder.bitcast(args[0], _F32)

    return types.float32(types.uint32), codegen


@intrinsic
def address_of(typingctx, pointer):
    """Return a pointer as an int64 address."""

    def codegen(context, builder, _signature, args):
        return builder.ptrtoint(args[0], _I64)

    return types.int64(pointer), codegen


def _pointer_to(number: types.Type):
    @intrinsic
    def pointer(typingctx, address):
        """Return an int64 address as a typed pointer."""

        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(number)(types.int64), codegen

    return pointer


f32_at, f64_at = _pointer_to(types.float32), _pointer_to(types.float64)
u8_at, u16_at = _pointer_to(types.uint8), _pointer_to(types.uint16)
i32_at, i64_at, u32_at = _pointer_to(types.int32), _pointer_to(types.int64), _pointer_to(types.uint32)
