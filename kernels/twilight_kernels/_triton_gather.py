"""Gathering on GPUs what is flagged among numbers, in an order that is the same each time."""

from __future__ import annotations

import triton
import triton.language as tl

LEAST_LOGIT = tl.constexpr(-3.4028234663852886e38)  # above minus infinity


@triton.jit
def fours(QUADS: tl.constexpr):
    """Numbers from zero on, four to a thread, ``[4, QUADS]``."""
    return tl.arange(0, 4)[:, None] + tl.arange(0, QUADS)[None, :] * 4


@triton.jit
def places_of(flags, found):
    """Places from ``found`` on of all that is flagged in some tiles, one thread's after another's; and how many.

    Each thread counts its own, so that threads wait for one another once, not for each number.
    """
    counts = tl.sum(flags[0], 0)
    for k in tl.static_range(1, len(flags)):
        counts += tl.sum(flags[k], 0)
    before = found - 1 + tl.cumsum(counts, 0) - counts
    places = ()
    for k in tl.static_range(len(flags)):
        places = places + (before[None, :] + tl.cumsum(flags[k], 0),)
        before += tl.sum(flags[k], 0)
    return places, found + tl.sum(counts, 0)


@triton.jit
def fill_quad(row, found):
    """Let the last quad of ``found`` entries of a row end with ``-inf``: they are read by four."""
    rest = tl.arange(0, 4)
    tl.store(row + found + rest, float("-inf"), mask=rest < (-found & 3))
