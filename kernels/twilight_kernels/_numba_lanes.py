"""The inner tiles of the CPU kernels, written as LLVM IR through numba intrinsics: keys, values.

Each intrinsic takes the shape of its inner tile as literal integers and unrolls it while code is generated,
so that accumulators live in registers whatever the loop vectorizer thinks. Addresses are plain ``int64``;
*kind* is defined in ``_numba_numbers``.
"""

from __future__ import annotations

import itertools

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._numba_ir import (
    F32,
    HALF,
    I8,
    I16,
    I32,
    I64,
    LANES,
    Loop,
    constant,
    element,
    int64,
    literals,
    load,
    prefetch,
    splat,
    store,
    zeros,
)
from ._numba_numbers import ITEM_BYTES, RAW_BF16, RAW_F16, RAW_F32
from .page_codec import planes

_ACCUMULATORS = 16  # vectors carried through an inner loop; 32 registers less operands and masks

_FAST = ("fast",)
_STORED = {RAW_F32: F32, RAW_BF16: I16, RAW_F16: HALF}


@intrinsic
def key_page_logits(
    typingctx, kind, page_size, heads, codes, channel_bytes, head_dim, query, bias, out, out_stride, ahead
):
    """Write ``out[h, t] = sum_d query[h, d] * code[d, t] + bias[h]`` for one page of keys.

    Literals: ``kind``, ``page_size`` (a multiple of 16), ``heads``.
    Addresses: ``codes`` of channel 0, ``channel_bytes`` from channel to channel; ``query`` float32
    ``[heads, head_dim]``; ``bias`` float32 ``[heads]``; ``out`` float32, ``out_stride`` floats from head to
    head; ``ahead`` codes that will be read next, and are fetched meanwhile (pages lie scattered: the hardware
    cannot know).
    """
    kind_, page_, heads_ = literals(kind, page_size, heads)
    signature = types.void(kind, page_size, heads, *(types.int64,) * 8)

    def codegen(context, builder, _signature, args):
        codes, channel_bytes, head_dim, query, bias, out, out_stride, ahead = args[3:]
        tiles = page_ // LANES
        for heads_here in _tiles(heads_, max(1, _ACCUMULATORS // tiles)):
            cells = [(h, t) for h in heads_here for t in range(tiles)]
            loop = Loop(builder, head_dim, [zeros(LANES)] * len(cells))
            base = builder.add(codes, builder.mul(loop.index, channel_bytes))
            if heads_here.start == 0:
                prefetch(builder, builder.add(ahead, builder.mul(loop.index, channel_bytes)))
            columns = [_key_tile(builder, kind_, page_, base, t) for t in range(tiles)]
            weights = {}
            for h in heads_here:
                row = builder.add(query, builder.mul(head_dim, int64(4 * h)))
                weights[h] = splat(builder, load(builder, element(builder, row, loop.index, 4), F32))
            loop.close([_madd(builder, weights[h], columns[t], loop.values[i]) for i, (h, t) in enumerate(cells)])
            for (h, t), total in zip(cells, loop.values):
                shift = splat(builder, load(builder, builder.add(bias, int64(4 * h)), F32))
                place = builder.add(out, builder.mul(out_stride, int64(4 * h)))
                scaled = builder.fmul(total, key_tile_scale(kind_, page_, t), flags=_FAST)
                store(
                    builder,
                    builder.fadd(scaled, shift, flags=_FAST),
                    builder.add(place, int64(4 * LANES * t)),
                )
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def unpack_key_page(typingctx, kind, page_size, codes, channel_bytes, head_dim, out):
    """Write the codes of one page as float32 ``out[d, t]``.

    ``key_page_logits`` of these numbers as raw ones are those of the codes, to the bit: they are added up in the same
    order, and what undoes a missing shift is a power of two.

    Literals: ``kind`` (packed), ``page_size`` (a multiple of 16). Addresses: ``codes`` of channel 0, ``out``.
    """
    kind_, page_ = literals(kind, page_size)
    signature = types.void(kind, page_size, *(types.int64,) * 4)

    def codegen(context, builder, _signature, args):
        codes, channel_bytes, head_dim, out = args[2:]
        loop = Loop(builder, head_dim, [])
        base = element(builder, codes, builder.mul(loop.index, channel_bytes), 1)
        target = element(builder, out, loop.index, 4 * page_)
        for tile in range(page_ // LANES):
            code = _key_tile(builder, kind_, page_, base, tile)
            code = builder.fmul(code, key_tile_scale(kind_, page_, tile), flags=_FAST)
            store(builder, code, builder.add(target, int64(4 * LANES * tile)))
        loop.close([])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def value_rows(
    typingctx,
    kind,
    heads,
    value_dim,
    group_size,
    base,
    offsets,
    weights,
    weight_stride,
    count,
    out,
    out_stride,
):
    """Add ``sum_n weights[group(d), h, n] * code[n, d]`` to ``out[h, d]`` over ``count`` token rows.

    Literals: ``kind``, ``heads``, ``value_dim``, ``group_size`` (``value_dim`` if raw).
    Addresses: ``base`` plus the int64 byte ``offsets[n]`` is row n; ``weights`` float32 ``[groups, heads,
    weight_stride]``; ``out`` float32, ``out_stride`` floats from head to head.
    """
    kind_, heads_, dim, group = literals(kind, heads, value_dim, group_size)
    signature = types.void(kind, heads, value_dim, group_size, *(types.int64,) * 7)

    def codegen(context, builder, _signature, args):
        base, offsets, weights, weight_stride, count, out, out_stride = args[4:]
        weight_bytes = builder.mul(weight_stride, int64(4))
        for plane in value_planes(kind_, dim, group):
            starts = range(0, plane.row_size, plane.lanes)
            for start, heads_here in itertools.product(starts, _tiles(heads_, max(1, _ACCUMULATORS // plane.fields))):
                cells = [(h, f) for h in heads_here for f in range(plane.fields)]
                loop = Loop(builder, count, [zeros(plane.lanes)] * len(cells))
                offset = load(builder, element(builder, offsets, loop.index, 8), I64)
                row = builder.add(builder.add(base, offset), int64(plane.start + start * plane.item_bytes))
                columns, new = plane.load(builder, row, start), []
                for (h, f), total in zip(cells, loop.values):
                    index = plane.channel(f, start) // group * heads_ + h
                    place = builder.add(weights, builder.mul(weight_bytes, int64(index)))
                    weight = load(builder, element(builder, place, loop.index, 4), F32)
                    new.append(_madd(builder, splat(builder, weight, plane.lanes), columns[f], total))
                loop.close(new)
                for (h, f), total in zip(cells, loop.values):
                    place = builder.add(out, builder.mul(out_stride, int64(4 * h)))
                    place = builder.add(place, int64(4 * plane.channel(f, start)))
                    scaled = builder.fmul(total, constant(plane.field_weight(f), plane.lanes), flags=_FAST)
                    old = load(builder, place, total.type, 4)
                    store(builder, builder.fadd(old, scaled, flags=_FAST), place)
        return context.get_dummy_value()

    return signature, codegen


class _ValuePlane:
    """One bit plane (or the raw numbers) of a value row: where it starts and how its lanes are read."""

    def __init__(self, kind: int, width: int, start: int, dim: int, weight: float) -> None:
        self.is_raw = kind in _STORED
        self.kind, self.width, self.start, self.weight = kind, width, start, weight
        self.fields = 1 if self.is_raw else 8 // width
        self.row_size = dim // self.fields  # elements of one field
        self.item_bytes = ITEM_BYTES[kind] if self.is_raw else 1
        self.lanes = next(n for n in (16, 8, 4, 2, 1) if self.row_size % n == 0)
        if self.is_raw:
            self.width = 0

    def channel(self, field: int, start: int) -> int:
        """Channel of the element ``start`` of a field."""
        return field * self.row_size + start

    def field_weight(self, field: int) -> float:
        """What an unshifted field counts: its plane's weight over its place in the byte."""
        return self.weight * 2.0 ** (-self.width * field)

    def load(self, builder, address, _start):
        """Emit the plane's codes from ``address`` on: a float32 vector of ``lanes`` for each field, see ``channel``."""
        if self.is_raw:
            return [_raw(builder, self.kind, address, self.lanes)]
        packed = load(builder, address, ir.VectorType(I8, self.lanes), 1)
        wide = builder.zext(packed, ir.VectorType(I32, self.lanes))
        out = []
        for f in range(self.fields):
            mask = ((1 << self.width) - 1) << (f * self.width)
            field = builder.and_(wide, constant(mask, self.lanes, I32)) if self.fields > 1 else wide
            out.append(builder.sitofp(field, ir.VectorType(F32, self.lanes)))
        return out


class _WholeRow:
    """A value row of several planes, put together before it is multiplied: rows lie as channels of keys do."""

    start, item_bytes, lanes = 0, 0, LANES

    def __init__(self, kind: int, dim: int) -> None:
        tiles = dim // LANES
        self.kind, self.dim = kind, dim
        self.fields = next(n for n in (4, 3, 2, 1) if tiles % n == 0)
        self.row_size = dim // self.fields

    def channel(self, field: int, start: int) -> int:
        """Channel of a tile's first lane."""
        return start * self.fields + field * LANES

    def field_weight(self, _field: int) -> float:
        return 1.0

    def load(self, builder, address, start):
        """Emit the codes of the row's channels from ``start`` on, its planes joined: float32 vectors, one a field."""
        first = self.channel(0, start) // LANES
        return [_key_tile(builder, self.kind, self.dim, address, first + f) for f in range(self.fields)]


def value_planes(kind: int, dim: int, group: int) -> list[_ValuePlane | _WholeRow]:
    """How a value row of ``dim`` channels is read: plane by plane, or whole where its planes fill vectors."""
    if kind in _STORED:
        return [_ValuePlane(kind, 0, 0, dim, 1.0)]
    sizes = [dim * width // 8 for width in planes(kind)]
    is_even = dim % LANES == 0 and group % LANES == 0 and all(LANES % n == 0 or n % LANES == 0 for n in sizes)
    if len(sizes) > 1 and is_even:
        return [_WholeRow(kind, dim)]
    found: list[_ValuePlane | _WholeRow] = []
    start, shift = 0, 0
    for width in planes(kind):
        found.append(_ValuePlane(kind, width, start, dim, float(1 << shift)))
        start, shift = start + dim * width // 8, shift + width
    return found


def _key_tile(builder, kind: int, page: int, channel, tile: int):
    """Sixteen codes (tokens ``16 * tile ...``) of one channel as float32; single planes stay unshifted."""
    if kind in _STORED:
        return _raw(builder, kind, builder.add(channel, int64(tile * LANES * ITEM_BYTES[kind])), LANES)
    widths, start, shift, total = planes(kind), 0, 0, None
    for width in widths:
        size = page * width // 8
        first, repeat = (tile * LANES) % size, LANES // min(size, LANES)
        packed = load(builder, builder.add(channel, int64(start + first)), ir.VectorType(I8, min(size, LANES)), 1)
        if repeat > 1:
            order = ir.Constant(ir.VectorType(I32, LANES), [lane % size for lane in range(LANES)])
            packed = builder.shuffle_vector(packed, ir.Constant(packed.type, ir.Undefined), order)
        wide = builder.zext(packed, ir.VectorType(I32, LANES))
        fields = _lane_fields(page, width, tile)
        mask = [((1 << width) - 1) << (f * width) for f in fields]
        code = builder.and_(wide, ir.Constant(ir.VectorType(I32, LANES), mask)) if width < 8 else wide
        if len(widths) > 1:
            code = builder.lshr(code, ir.Constant(code.type, [f * width for f in fields]))
            code = builder.shl(code, constant(shift, LANES, I32))
        total = code if total is None else builder.or_(total, code)
        start, shift = start + size, shift + width
    return builder.sitofp(total, ir.VectorType(F32, LANES))


def key_tile_scale(kind: int, page: int, tile: int):
    """What undoes the missing shift of ``_key_tile``, lane by lane."""
    if kind in _STORED or len(planes(kind)) > 1:
        return constant(1.0, LANES)
    scale = [2.0 ** (-kind * f) for f in _lane_fields(page, kind, tile)]
    return ir.Constant(ir.VectorType(F32, LANES), scale)


def _lane_fields(page: int, width: int, tile: int) -> list[int]:
    """Which field of its byte each of the sixteen tokens of ``tile`` is."""
    return [(tile * LANES + lane) // (page * width // 8) for lane in range(LANES)]


def _raw(builder, kind: int, address, lanes: int):
    stored = load(builder, address, ir.VectorType(_STORED[kind], lanes), ITEM_BYTES[kind])
    if kind == RAW_F32:
        return stored
    if kind == RAW_F16:
        return builder.fpext(stored, ir.VectorType(F32, lanes))
    wide = builder.shl(builder.zext(stored, ir.VectorType(I32, lanes)), constant(16, lanes, I32))
    return builder.bitcast(wide, ir.VectorType(F32, lanes))


def _tiles(count: int, size: int) -> list[range]:
    return [range(first, min(count, first + size)) for first in range(0, count, size)]


def _madd(builder, a, b, c):
    return builder.fadd(c, builder.fmul(a, b, flags=_FAST), flags=_FAST)
