"""Codes of a page on matrix tiles of CPUs (AMX): they are bytes, and so are the queries, see ``_numba_limbs``.

Sums of bytes by bytes are exact, so no sum depends on what is summed beside it. Tiles take four channels at a time, one
*quad*, and sixteen quads a step, in the order 0, 4, 8, 12, 1, 5, ...: so do limbs of queries arise from vectors of
float32.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._numba_amx import multiply_strip
from ._numba_ir import I8, I32, LANES, Loop, chosen, constant, element, int64, literals, load, prefetch, store
from ._numba_limbs import row_of_limb
from .page_codec import planes

_LINE = 64  # bytes of a cache line, and of a row of a tile
_AT_ONCE = 4  # tiles of 16 tokens that are multiplied at a time
_WORDS = ir.VectorType(I32, LANES)


@intrinsic
def unpack_key_tiles(typingctx, kind, page_size, codes, key_dim, out, ahead):
    """Write the codes of one page as uint8 ``out[row of quad, token, channel of quad]``.

    Codes of one plane stay where they are in their byte: ``sum_limbs`` undoes it. Literals: ``kind`` (packed),
    ``page_size``. Addresses: ``codes`` of channel 0; ``ahead``, codes that will be read next, and are fetched
    meanwhile (pages lie scattered: the hardware cannot know).
    """
    kind_, page_ = literals(kind, page_size)
    signature = types.void(kind, page_size, *(types.int64,) * 4)

    def codegen(context, builder, _signature, args):
        codes, key_dim, out, ahead = args[2:]
        channel_bytes, tiles = page_ * kind_ // 8, page_ // LANES
        loop = Loop(builder, builder.lshr(key_dim, int64(3)), [])
        source, next_source = (element(builder, place, loop.index, 8 * channel_bytes) for place in (codes, ahead))
        for line in range(0, 8 * channel_bytes, _LINE):
            prefetch(builder, builder.add(next_source, int64(line)))
        target = element(builder, out, _row_of_pair(builder, loop.index), tiles * _LINE)
        for quad in range(2):
            found = {}
            here = builder.add(source, int64(quad * 4 * channel_bytes))
            for tile in range(tiles):
                row = _code_row(builder, kind_, page_, here, tile, found)
                store(builder, row, builder.add(target, int64(_LINE * (4 * quad * tiles + tile))), _LINE)
        loop.close([])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def multiply_limbs(typingctx, page_size, heads, limbs, wide, codes, sums):
    """Set ``sums[r, t] = sum_d limbs[r, d] * codes[d, t]``.

    Literals: ``page_size``, ``heads``. Addresses: ``limbs`` of ``write_limbs``, ``codes`` of ``unpack_key_tiles``,
    int32 ``sums [16 * tiles, page_size]``.
    """
    page_, heads_ = literals(page_size, heads)
    signature = types.void(page_size, heads, *(types.int64,) * 4)

    def codegen(context, builder, _signature, args):
        limbs, wide, codes, sums = args[2:]
        stride, at_once = int64(4 * page_), min(_AT_ONCE, page_ // LANES)
        steps = builder.lshr(wide, int64(6))
        for first in range(0, row_of_limb(heads_ - 1, 0) + 1, 16):
            a = builder.add(limbs, builder.mul(wide, int64(first)))
            for start in range(0, 4 * page_, _LINE * at_once):
                b, c = builder.add(codes, int64(start)), builder.add(sums, int64(4 * page_ * first + start))
                multiply_strip(builder, "tdpbuud", at_once, 0, 0, a, wide, steps, int64(0), b, stride, c, stride)
        return context.get_dummy_value()

    return signature, codegen


def _code_row(builder, kind: int, page: int, source, tile: int, found):
    """Sixteen tokens of one quad as a vector of 64 bytes, four channels a token."""
    widths, start, shift, total = planes(kind), 0, 0, None
    tokens = range(LANES * tile, LANES * (tile + 1))
    for width in widths:
        size = page * width // 8
        piece, first = min(size, LANES), tokens[0] % size
        if (start, first) not in found:
            packed = _quad(builder, source, page * kind // 8, start + first, piece)
            order = [channel * piece + token % piece for token in range(LANES) for channel in range(4)]
            found[start, first] = builder.bitcast(chosen(builder, packed, packed, order), _WORDS)
        fields, mask = [token // size for token in tokens], ((1 << width) - 1) * 0x01010101
        codes = found[start, first]
        if len(widths) > 1:
            codes = builder.lshr(codes, ir.Constant(_WORDS, [field * width for field in fields]))
            codes = builder.shl(builder.and_(codes, constant(mask, LANES, I32)), constant(shift, LANES, I32))
        elif width < 8:
            codes = builder.and_(codes, ir.Constant(_WORDS, [mask << field * width for field in fields]))
        total = codes if total is None else builder.or_(total, codes)
        start, shift = start + size, shift + width
    return total


def _quad(builder, source, channel_bytes: int, start: int, piece: int):
    """The ``piece`` bytes from ``start`` on of each of four channels."""
    if piece == channel_bytes:
        return load(builder, source, ir.VectorType(I8, 4 * piece), 1)
    parts = [
        load(builder, builder.add(source, int64(channel * channel_bytes + start)), ir.VectorType(I8, piece), 1)
        for channel in range(4)
    ]
    while len(parts) > 1:
        order = range(2 * parts[0].type.count)
        parts = [chosen(builder, a, b, order) for a, b in zip(parts[0::2], parts[1::2])]
    return parts[0]


def _row_of_pair(builder, pair):
    """Row of the tiles, one below the other, that holds the first of two quads; the second is four rows below."""
    step = builder.shl(builder.lshr(pair, int64(3)), int64(4))
    inner = builder.or_(
        builder.shl(builder.and_(pair, int64(1)), int64(3)), builder.and_(builder.lshr(pair, int64(1)), int64(3))
    )
    return builder.or_(step, inner)
