"""Words for writing LLVM IR with numba: loops, loads and stores by int64 address, constants.

``builder`` is llvmlite's throughout; a *mask* is a vector of bits.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core.errors import RequireLiteralValue

LANES = 16  # float32 numbers of a vector
I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F32, HALF = ir.FloatType(), ir.HalfType()


class Loop:
    """``for index in range(count)`` with vectors carried in registers."""

    def __init__(self, builder, count, initial) -> None:
        self._builder = builder
        before = builder.block
        self._head = builder.append_basic_block("head")
        body = builder.append_basic_block("body")
        self._done = builder.append_basic_block("done")
        builder.branch(self._head)
        builder.position_at_end(self._head)
        self.index = builder.phi(I64)
        self.index.add_incoming(int64(0), before)
        self.values = []
        for value in initial:
            phi = builder.phi(value.type)
            phi.add_incoming(value, before)
            self.values.append(phi)
        builder.cbranch(builder.icmp_signed("<", self.index, count), body, self._done)
        builder.position_at_end(body)

    def close(self, new) -> None:
        builder = self._builder
        self.index.add_incoming(builder.add(self.index, int64(1)), builder.block)
        for phi, value in zip(self.values, new):
            phi.add_incoming(value, builder.block)
        builder.branch(self._head)
        builder.position_at_end(self._done)


def literals(*given) -> list[int]:
    for value in given:
        if not isinstance(value, types.IntegerLiteral):
            raise RequireLiteralValue("tile shapes must be literal integers")
    return [value.literal_value for value in given]


def load(builder, address, kind, align: int | None = None):
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def store(builder, value, address, align: int = 4) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def prefetch(builder, address) -> None:
    """Ask for the cache line at ``address``, to be read and kept."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *(ir.Constant(I32, n) for n in (0, 3, 1)))


def call(builder, name: str, result, *args):
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), args)


def element(builder, address, index, item_bytes: int):
    return builder.add(address, builder.mul(index, int64(item_bytes)))


def int64(value: int):
    return ir.Constant(I64, value)


def constant(value: float, lanes: int, kind=F32):
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


def zeros(lanes: int):
    return constant(0.0, lanes)


def splat(builder, scalar, lanes: int = LANES):
    vector = ir.VectorType(scalar.type, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), constant(0, lanes, I32))


def rotated(builder, vector, by: int):
    lanes = vector.type.count
    order = ir.Constant(ir.VectorType(I32, lanes), [(lane + by) % lanes for lane in range(lanes)])
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), order)


def chosen(builder, a, b, lanes):
    """The listed lanes of two vectors, one behind the other."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def smaller(builder, a, b):
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)
