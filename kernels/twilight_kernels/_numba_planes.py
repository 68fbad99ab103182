"""Packing codes into bit planes and back on CPUs, eight bytes at a time (definition: ``_reference.pack``)."""

from __future__ import annotations

import numpy as np
from numba import carray

from ._numba_numbers import ANY, exact, i64_at, u8_at

_EVERY_BYTE = 0x0101010101010101


@exact
def pack_codes(codes, count, bits, packed):
    """Pack ``count`` codes planar."""
    if bits == 3:
        _pack_plane(codes, count, 0, 2, packed)
        _pack_plane(codes, count, 2, 1, packed + count // 4)
    else:
        _pack_plane(codes, count, 0, bits, packed)


@exact
def _pack_plane(codes, count, shift, width, packed):
    """Pack bits ``shift .. shift + width`` of the codes, eight bytes at a time."""
    size, mask = count * width // 8, (1 << width) - 1
    words, tail, given = (
        carray(i64_at(packed), (ANY,)),
        carray(u8_at(packed), (ANY,)),
        carray(u8_at(codes), (ANY,)),
    )
    for j in range(size // 8):
        word = np.int64(0)
        for f in range(8 // width):
            field = carray(i64_at(codes + f * size), (ANY,))[j] >> shift
            word |= (field & (mask * _EVERY_BYTE)) << (width * f)
        words[j] = word
    for j in range(size // 8 * 8, size):
        byte = np.int64(0)
        for f in range(8 // width):
            byte |= ((np.int64(given[f * size + j]) >> shift) & mask) << (width * f)
        tail[j] = byte


@exact
def unpack_codes(packed, count, bits, codes):
    """Undo ``_pack``."""
    if bits == 3:
        _unpack_plane(packed, count, 0, 2, codes)
        _unpack_plane(packed + count // 4, count, 2, 1, codes)
    else:
        _unpack_plane(packed, count, 0, bits, codes)


@exact
def _unpack_plane(packed, count, shift, width, codes):
    """Set bits ``shift .. shift + width`` of the codes; the lowest plane, first, clears the others."""
    size, mask = count * width // 8, (1 << width) - 1
    words, tail, out = (
        carray(i64_at(packed), (ANY,)),
        carray(u8_at(packed), (ANY,)),
        carray(u8_at(codes), (ANY,)),
    )
    keep = 0 if shift == 0 else -1
    for f in range(8 // width):
        target = carray(i64_at(codes + f * size), (ANY,))
        for j in range(size // 8):
            field = (words[j] >> (width * f)) & (mask * _EVERY_BYTE)
            target[j] = (target[j] & keep) | (field << shift)
        for j in range(size // 8 * 8, size):
            field = (np.int64(tail[j]) >> (width * f)) & mask
            out[f * size + j] = (np.int64(out[f * size + j]) & keep) | (field << shift)
