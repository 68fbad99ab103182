"""What PTX instructions compute, on the lanes of some warps at once: registers are arrays of unsigned numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Lanes = Any  # a numpy array, 32 numbers for each warp
Function = Callable[..., Any]

_F = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
_U = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_S = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
LANES = 32  # of a warp
_LANE = np.arange(LANES)
_TINY = np.float32(2.0**-126)


@cache
def function_of(name: str) -> Function:
    """The function of an instruction that reads and writes registers only.

    Raises:
        NotImplementedError: an instruction that is not known here.
    """
    stem, *suffixes = name.split(".")
    found = globals().get(f"_{stem}")
    if found is None:
        raise NotImplementedError(f"no such instruction here: {name}")
    kinds = [x for x in suffixes if re.fullmatch(r"[subf]\d+(x2)?|bf16(x2)?|pred", x)]
    plain = [x for x in suffixes if x not in kinds]
    if stem != "cvt" and kinds and kinds[-1] == "f16x2":
        return _in_pairs(found(["f16"], plain, name))
    made: Function = found(kinds, plain, name)
    return made


def _in_pairs(function: Function) -> Function:
    """Of registers of two float16 numbers each."""
    return lambda *inputs: function(*(np.ascontiguousarray(x).view(np.uint16) for x in inputs)).view(np.uint32)


def _bits(kind: str) -> int:
    return 0 if kind == "pred" else int(re.search(r"\d+", kind.replace("bf", "f"))[0])  # type: ignore[index]


def _as(kind: str) -> Any:
    """The numpy type by which the lanes of a register are looked at."""
    if kind in _F:
        return _F[kind]
    if kind == "pred":
        return np.bool_
    return (_S if kind[0] == "s" else _U)[max(16, _bits(kind))]


def _seen(x: Lanes, kind: str) -> Lanes:
    if kind == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x if x.dtype == np.bool_ else x.view(_as(kind))


def _kept(x: Lanes, kind: str) -> Lanes:
    if kind == "pred":
        return x.astype(np.bool_)
    if kind == "bf16":
        return bfloat16_bits(x.astype(np.float32))
    kept = x.astype(_as(kind), copy=False)
    return kept.view(_U[max(16, _bits(kind))])


def bfloat16_bits(x: Lanes) -> Lanes:
    """The nearest bfloat16 numbers' bits, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _simple(compute: Callable[..., Lanes]) -> Function:
    def make(kinds: list[str], _suffixes: list[str], _name: str) -> Function:
        kind = kinds[-1]

        def run(*inputs: Lanes) -> Lanes:
            return _kept(compute(*(_seen(x, kind) for x in inputs)), kind)

        return run

    return make


def _flushed(x: Lanes) -> Lanes:
    return np.where(np.abs(x) < _TINY, np.float32(0), x)


_add = _simple(lambda a, b: a + b)
_sub = _simple(lambda a, b: a - b)
_and = _simple(lambda a, b: a & b)
_or = _simple(lambda a, b: a | b)
_xor = _simple(lambda a, b: a ^ b)
_not = _simple(lambda a: ~a)
_neg = _simple(lambda a: -a)
_abs = _simple(np.abs)
_max = _simple(lambda a, b: np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b))
_min = _simple(lambda a, b: np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b))


def _fma(kinds: list[str], suffixes: list[str], _name: str) -> Function:
    kind, flushes = kinds[-1], "ftz" in suffixes

    def run(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
        exact = _seen(a, kind).astype(np.float64) * _seen(b, kind) + _seen(c, kind)
        found = exact.astype(_as(kind) if kind != "bf16" else np.float32)
        return _kept(_flushed(found) if flushes else found, kind)

    return run


def _mul(kinds: list[str], suffixes: list[str], _name: str) -> Function:
    kind = kinds[-1]
    if kind[0] in "us":
        half = "wide" if "wide" in suffixes else "hi" if "hi" in suffixes else "lo"
        return lambda a, b: _product(a, b, kind, half)
    return _simple(lambda a, b: a * b)(kinds, suffixes, _name)


def _product(a: Lanes, b: Lanes, kind: str, half: str) -> Lanes:
    bits, signed = _bits(kind), kind[0] == "s"
    if half == "lo":
        return a * b
    if bits == 64:
        whole = [int(x) * int(y) for x, y in zip(_seen(a, kind), _seen(b, kind), strict=True)]
        return np.array([(x >> 64) & (2**64 - 1) for x in whole], np.uint64)
    wide = np.int64 if signed else np.uint64
    found = _seen(a, kind).astype(wide) * _seen(b, kind).astype(wide)
    if half == "wide":
        return found.astype((_S if signed else _U)[2 * bits]).view(_U[2 * bits])
    return (found >> bits).astype(_S[bits] if signed else _U[bits]).view(_U[bits])


def _mad(kinds: list[str], suffixes: list[str], _name: str) -> Function:
    kind, half = kinds[-1], "wide" if "wide" in suffixes else "hi" if "hi" in suffixes else "lo"
    return lambda a, b, c: _product(a, b, kind, half) + c


def _div(kinds: list[str], suffixes: list[str], _name: str) -> Function:
    kind = kinds[-1]
    if kind[0] in "us":

        def divide(a: Lanes, b: Lanes) -> Lanes:
            x, y = _seen(a, kind), _seen(b, kind)
            quotient = np.abs(x.astype(np.int64)) // np.maximum(np.abs(y.astype(np.int64)), 1)
            return _kept(np.where((x < 0) != (y < 0), -quotient, quotient), kind)

        return divide
    return _simple(lambda a, b: a / b)(kinds, suffixes, _name)


def _rem(kinds: list[str], _suffixes: list[str], _name: str) -> Function:
    kind = kinds[-1]

    def remain(a: Lanes, b: Lanes) -> Lanes:
        x, y = _seen(a, kind).astype(np.int64), np.abs(_seen(b, kind).astype(np.int64))
        rest = np.abs(x) % np.maximum(y, 1)
        return _kept(np.where(x < 0, -rest, rest), kind)

    return remain


def _shl(kinds: list[str], _suffixes: list[str], _name: str) -> Function:
    bits = _bits(kinds[-1])
    return lambda a, n: np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), a.dtype.type(0))


def _shr(kinds: list[str], _suffixes: list[str], _name: str) -> Function:
    kind, bits = kinds[-1], _bits(kinds[-1])

    def shift(a: Lanes, n: Lanes) -> Lanes:
        x = _seen(a, kind)
        found = x >> np.minimum(n, bits - 1).astype(x.dtype)
        if kind[0] != "s":
            found = np.where(n < bits, found, x.dtype.type(0))
        return _kept(found, kind)

    return shift


def _bfe(kinds: list[str], _suffixes: list[str], _name: str) -> Function:
    kind = kinds[-1]

    def extract(a: Lanes, at: Lanes, length: Lanes) -> Lanes:
        found = (a >> (at & 31)) & ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)).astype(np.uint32)
        if kind[0] == "s":
            sign = np.uint32(1) << (length - 1)
            found = (found ^ sign) - sign
        return found.astype(np.uint32)

    return extract


def _lop3(_kinds: list[str], _suffixes: list[str], _name: str) -> Function:
    def look_up(a: Lanes, b: Lanes, c: Lanes, table: Lanes) -> Lanes:
        found = np.zeros_like(a)
        for row in range(8):
            if int(table[0]) >> row & 1:
                found |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return found

    return look_up


def _prmt(_kinds: list[str], _suffixes: list[str], _name: str) -> Function:
    def permute(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
        octets = np.concatenate([a[:, None].view(np.uint8), b[:, None].view(np.uint8)], 1)
        found = np.zeros((len(a), 4), np.uint8)
        for i in range(4):
            choice = (selector >> np.uint32(4 * i)) & 15
            byte = octets[np.arange(len(a)), choice & 7]
            found[:, i] = np.where(choice & 8, np.where(byte & 128, 255, 0), byte)
        return found.view(np.uint32)[:, 0]

    return permute


def _selp(_kinds: list[str], _suffixes: list[str], _name: str) -> Function:
    return lambda a, b, p: np.where(p, a, b)


def _mov(kinds: list[str], _suffixes: list[str], _name: str) -> Function:
    bits = _bits(kinds[-1])

    def move(*inputs: Lanes) -> Lanes:
        if len(inputs) > 1:  # packed, the first lowest
            part = bits // len(inputs)
            whole = [x.astype(np.uint64) << np.uint64(part * i) for i, x in enumerate(inputs)]
            return np.bitwise_or.reduce(whole).astype(_U[bits])
        return inputs[0]

    return move


def unpacked(x: Lanes, count: int) -> list[Lanes]:
    """The parts of a register, the lowest first."""
    part = 8 * x.itemsize // count
    return [(x >> x.dtype.type(part * i)).astype(_U[part]) for i in range(count)]


_COMPARE: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: (a != b) & ~_unordered(a, b), "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "neu": lambda a, b: a != b, "equ": lambda a, b: (a == b) | _unordered(a, b),
    "ltu": lambda a, b: (a < b) | _unordered(a, b), "leu": lambda a, b: (a <= b) | _unordered(a, b),
    "gtu": lambda a, b: (a > b) | _unordered(a, b), "geu": lambda a, b: (a >= b) | _unordered(a, b),
    "num": lambda a, b: ~_unordered(a, b), "nan": lambda a, b: _unordered(a, b),
}  # fmt: skip


def _unordered(a: Lanes, b: Lanes) -> Lanes:
    return (a != a) | (b != b)


def _setp(kinds: list[str], suffixes: list[str], name: str) -> Function:
    kind = kinds[-1]
    compare = _COMPARE[suffixes[0]]
    combine = next((x for x in suffixes[1:] if x in ("and", "or", "xor")), None)

    def test(a: Lanes, b: Lanes, *other: Lanes) -> Lanes:
        found = compare(_seen(a, kind), _seen(b, kind))
        if combine:
            found = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine](found, other[0])
        return found

    return test


def _cvt(kinds: list[str], suffixes: list[str], name: str) -> Function:
    to, source = kinds[0], kinds[-1]
    if "tf32" in suffixes:  # ties away from zero
        return lambda a: (a + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    if to.endswith("x2"):
        half = to[:-2]
        return lambda a, b: (
            (_kept(_seen(a, source), half).astype(np.uint32) << 16) | _kept(_seen(b, source), half)
        )  # the first is the upper one
    whole = next((x for x in suffixes if x in ("rni", "rzi", "rmi", "rpi")), None)

    def convert(a: Lanes) -> Lanes:
        x = _seen(a, source)
        if source[0] in "ubs" and source != "bf16" and _bits(source) == 8:
            x = (x & 0xFF).astype(np.uint8).view(_S[8] if source[0] == "s" else np.uint8)
        if whole:
            x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[whole](x)
            if to[0] in "us":
                bounds = np.iinfo((_S if to[0] == "s" else _U)[_bits(to)])
                x = np.where(np.isnan(x), 0, np.clip(x.astype(np.float64), float(bounds.min), float(bounds.max)))
        if to[0] in "us" and _bits(to) == 8:
            return x.astype(np.int64).astype(_S[8] if to[0] == "s" else np.uint8).astype(np.int16).view(np.uint16)
        return _kept(x, to)

    return convert


def _ex2(_kinds: list[str], suffixes: list[str], _name: str) -> Function:
    def power(a: Lanes) -> Lanes:
        x = a.view(np.float32)
        found = np.exp2((_flushed(x) if "ftz" in suffixes else x).astype(np.float64)).astype(np.float32)
        return (_flushed(found) if "ftz" in suffixes else found).view(np.uint32)

    return power


_sqrt = _simple(lambda a: np.sqrt(a))
_popc = _simple(lambda a: np.array([int(x).bit_count() for x in a], a.dtype))


def _shfl(_kinds: list[str], suffixes: list[str], _name: str) -> Function:
    mode = next(x for x in suffixes if x in ("bfly", "up", "down", "idx"))

    def shuffle(a: Lanes, b: Lanes, c: Lanes, _mask: Lanes) -> Lanes:
        n, clamp, mask = (x.reshape(-1, LANES).astype(np.int64) for x in (b & 31, c & 31, (c >> 8) & 31))
        last, first = (_LANE & mask) | (clamp & ~mask), _LANE & mask
        if mode == "up":
            source = _LANE - n
            inside = source >= last  # of an upward shuffle the clamp is the lowest lane
        elif mode == "down":
            source = _LANE + n
            inside = source <= last
        elif mode == "bfly":
            source = _LANE ^ n
            inside = source <= last
        else:
            source = first | (n & ~mask)
            inside = source <= last
        taken = np.where(inside, source, _LANE)
        return np.take_along_axis(a.reshape(-1, LANES), np.broadcast_to(taken, n.shape), 1).reshape(-1)

    return shuffle


def _redux(kinds: list[str], suffixes: list[str], _name: str) -> Function:
    kind = kinds[-1]
    reduce = {"add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or}
    chosen = next(reduce[x] for x in suffixes if x in reduce)

    def run(a: Lanes, _mask: Lanes) -> Lanes:
        x = _seen(a, kind).reshape(-1, LANES)
        return _kept(np.repeat(chosen.reduce(x, 1, dtype=x.dtype), LANES), kind)

    return run


def _mma(kinds: list[str], suffixes: list[str], name: str) -> Function:
    """``m16n8``: fragments as the PTX manual lays them out (warp-level matrix instructions)."""
    shape, kind = next(x for x in suffixes if x.startswith("m16n8")), name.split(".")[-2]
    depth, parts = int(shape.split("k")[1]), 1 if kind == "tf32" else 2
    if kind not in ("f16", "bf16", "tf32"):
        raise NotImplementedError(f"no such matrix product here: {name}")
    many = depth // 4 * 2 // parts  # registers of the first matrix, of eight rows and four or eight columns each

    def multiply(*given: Lanes) -> tuple[Lanes, ...]:
        a = left_matrix(given[:many], kind)
        b = np.zeros((len(a), depth, 8))
        right = _fragments(given[many : many + many // 2], kind)
        for register in range(many // 2):
            for i in range(parts):
                b[:, _PAIR * parts + i + 4 * parts * register, _ROW] = right[:, :, register, i]
        return accumulated(a @ b, given[many + many // 2 :])

    return multiply


def left_matrix(registers: tuple[Lanes, ...], kind: str) -> Lanes:
    """Sixteen rows of a first matrix from the registers of warps, ``[warp, 16, depth]``."""
    found = _fragments(registers, kind)
    warps, _, many, parts = found.shape
    a = np.zeros((warps, 16, 2 * parts * many))
    for register in range(many):
        for i in range(parts):
            a[:, _ROW + 8 * (register % 2), _PAIR * parts + i + 4 * parts * (register // 2)] = found[:, :, register, i]
    return a


def accumulated(product: Lanes, registers: tuple[Lanes, ...]) -> tuple[Lanes, ...]:
    """Registers of float32 sums, four for each eight columns, with ``product [warp, 16, columns]`` added."""
    found = []
    for register, x in enumerate(registers):
        row, column = _ROW + 8 * (register % 4 // 2), 8 * (register // 4) + _PAIR * 2 + register % 2
        total = product[:, row, column] + x.view(np.float32).reshape(-1, LANES)
        found.append(total.astype(np.float32).reshape(-1).view(np.uint32))
    return tuple(found)


def numbers_of(halves: Lanes, kind: str) -> Lanes:
    """The numbers that 16 bits each make along the last axis; of TF32 half of them."""
    if kind == "tf32":  # tensor cores do not look at the last 13 bits
        return (halves.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return _seen(halves, kind).astype(np.float64)


def _fragments(registers: tuple[Lanes, ...], kind: str) -> Lanes:
    """Numbers of the warps' registers, ``[warp, lane, register, number]``: one of 19 bits each, or two of 16."""
    bits = np.stack(registers, 1)
    return numbers_of(bits.view(np.uint16), kind).reshape(-1, LANES, len(registers), 1 if kind == "tf32" else 2)


_ROW, _PAIR = _LANE // 4, _LANE % 4
