"""The int64 parameter block of the codec's workers, and what keys and values do alike with it.

A task is one page of one KV head. Scales are worked out into a buffer of the call (``NEW_LO``, ``NEW_STEP``),
and go to the pages only if everything in it is finite.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from ._numba_numbers import (
    ANY,
    RAW_F16,
    RAW_F32,
    exact,
    float_bits,
    float_to_half,
    half_to_float,
    i32_at,
    inlined,
    item_bytes,
    read_row,
    u16_at,
)

IS_BAD, PAGES, HEADS, TOKENS, DIM, GROUPS, GROUP_SIZE = range(2, 9)
BITS, KIND, SLOTS, CODES, LO, STEP = range(9, 15)
X, X_PAGE, X_HEAD, X_TOKEN = range(15, 19)  # the caller's numbers: address, strides in elements
NEW_LO, NEW_STEP, ROUND, CLIP = range(19, 23)
MEASURE, WRITE, LOAD = range(3)  # rounds
_EXPONENT = np.uint32(0x7F800000)


@inlined
def stored_page(block, task):
    """Stored page of one head."""
    slot = np.int64(carray(i32_at(block[SLOTS]), (block[PAGES],))[task // block[HEADS]])
    return slot * block[HEADS] + task % block[HEADS]


@inlined
def place(block, task):
    """Address of the first token of the caller's numbers."""
    page, head = task // block[HEADS], task % block[HEADS]
    return block[X] + (page * block[X_PAGE] + head * block[X_HEAD]) * item_bytes(block[KIND])


@inlined
def token_stride(block):
    """Bytes from token to token of the caller's numbers."""
    return block[X_TOKEN] * item_bytes(block[KIND])


@inlined
def float_row(kind, place, count, buffer):
    """Address of one token of the caller's numbers as float32: where it is, or in the buffer."""
    if kind == RAW_F32:
        return place
    read_row(kind, place, count, buffer)
    return buffer.ctypes.data


@exact
def require_finite(block, row):
    """Raise the flag unless every number of the row is finite: its exponent is not all ones."""
    num_bad = np.int32(0)
    for i in range(row.size):
        num_bad += np.int32((float_bits(row[i]) & _EXPONENT) == _EXPONENT)
    if num_bad != 0:
        block[IS_BAD] = 1


@exact
def propose_scales(block, start, lo, step):
    """Round the scales of one page into the buffer; raise the flag if float16 cannot hold them."""
    for row, address in ((lo, block[NEW_LO]), (step, block[NEW_STEP])):
        halves = carray(u16_at(address + 2 * start), (ANY,))
        for i in range(row.size):
            halves[i] = float_to_half(row[i])
            row[i] = half_to_float(halves[i])
        require_finite(block, row)


@exact
def write_scales(block, start, proposed, lo, step):
    """Copy the scales of one page from the buffer of this call; leave them as float32, too."""
    from_lo = carray(u16_at(block[NEW_LO] + 2 * proposed), (ANY,))
    from_step = carray(u16_at(block[NEW_STEP] + 2 * proposed), (ANY,))
    to_lo, to_step = (
        carray(u16_at(block[LO] + 2 * start), (ANY,)),
        carray(u16_at(block[STEP] + 2 * start), (ANY,)),
    )
    for i in range(lo.size):
        to_lo[i] = from_lo[i]
        to_step[i] = from_step[i]
    read_scales(block, start, lo, step)


@exact
def read_scales(block, start, lo, step):
    """Read stored scales."""
    read_row(RAW_F16, block[LO] + 2 * start, lo.size, lo)
    read_row(RAW_F16, block[STEP] + 2 * start, lo.size, step)


@exact
def invert(step):
    """Replace each step by its inverse, 0 if it is 0."""
    for i in range(step.size):
        step[i] = np.float32(1) / step[i] if step[i] > 0 else np.float32(0)
