"""Top-p pruning on CPUs: bisection on logits from a provable start.

Definition: ``_reference.top_p_threshold``. Tokens below ``largest + ln((mass - need) / count)`` together
weigh less than ``mass - need``, so only the few above it are looked at again, and after each round of four
halvings only those that are still undecided.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ._numba_ir import LANES
from ._numba_numbers import LOWEST, address_of, exact, f32_at, f64_at, fast, fast_exp, fetch_add, inlined
from ._numba_pool import BLOCK_SIZE, SOURCE_HASH, compile_worker, run
from ._numba_prompt_lanes import sum_of_weights
from ._numba_rows import compress_between, largest_of_vectors

_ROUNDS, _HALVINGS = 6, 4  # 24 halvings of the interval
_SMALLEST = np.float32(1.0e-30)
_HIGHEST = np.float32(3.4e38)
_LOG2_E = np.float32(1.4426950408889634)
_ROWS, _COLUMNS, _LOGITS, _LOGITS_ROW, _FORCED, _MIN_KEEP, _OUT, _P = range(2, 10)


def top_p_threshold(logits: Tensor, p: float, *, forced_lse: Tensor | None = None, min_keep: int = 0) -> Tensor:
    """See ``_reference.top_p_threshold``."""
    rows, columns = logits.shape
    out = torch.full((rows,), -torch.inf)
    if p >= 1.0 or rows == 0 or columns == 0:
        return out
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    forced_lse = None if forced_lse is None else forced_lse.contiguous()
    block = np.zeros(BLOCK_SIZE, np.int64)
    block[_ROWS], block[_COLUMNS], block[_OUT] = rows, columns, out.data_ptr()
    block[_LOGITS], block[_LOGITS_ROW] = logits.data_ptr(), logits.stride(0)
    block[_FORCED] = 0 if forced_lse is None else forced_lse.data_ptr()
    block[_MIN_KEEP] = min_keep
    block.view(np.float64)[_P] = p
    run(_threshold_worker(), block.ctypes.data, rows)
    return out


@cache
def _threshold_worker() -> int:
    source = SOURCE_HASH

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, columns = address_of(arg), block[_COLUMNS]
        padded = (columns + LANES - 1) // LANES * LANES
        present = np.empty(padded, np.float32)
        near = np.empty((2, padded), np.float32)
        while True:
            row = fetch_add(ticket, 1)
            if row >= block[_ROWS] * (source >= 0):
                break
            _row_threshold(block, row, present, near)

    return compile_worker(worker, "top_p_threshold")


@exact
def _row_threshold(block, row, present, near):
    """Write the threshold of one row; here, not below, may infinity appear."""
    start = block[_LOGITS] + 4 * row * block[_LOGITS_ROW]
    logits = carray(f32_at(start), (block[_COLUMNS],))
    out = carray(f32_at(block[_OUT]), (block[_ROWS],))
    tiles, given = block[_COLUMNS] // LANES, present.ctypes.data
    count = compress_between(start, start, tiles, LOWEST, np.float32(np.inf), given, near.ctypes.data)
    for i in range(tiles * LANES, block[_COLUMNS]):
        if logits[i] >= LOWEST:
            present[count] = logits[i]
            count += 1
    if count == 0:
        return
    _pad(present, count)
    top = largest(present, 0, count)
    forced_top, forced = LOWEST, np.float32(0)
    if block[_FORCED] != 0 and carray(f32_at(block[_FORCED]), (block[_ROWS],))[row] > LOWEST:
        forced_top, forced = carray(f32_at(block[_FORCED]), (block[_ROWS],))[row], np.float32(1)
    peak = max(top, forced_top)
    mass = mass_of(present, count, peak)
    p = np.float32(carray(f64_at(block.ctypes.data), (BLOCK_SIZE,))[_P])
    forced *= fast_exp(forced_top - peak)
    need, min_keep = p * (mass + forced) - forced, min(block[_MIN_KEEP], count)
    if need <= 0 and min_keep <= 0:
        out[row] = np.inf
        return
    out[row] = find_threshold(present, count, top, peak, mass, need, min_keep, near)


@fast
def find_threshold(logits, count, top, peak, mass, need, min_keep, near):
    """Find the logit from which tokens carry ``need`` of the mass and are at least ``min_keep``.

    Masses are relative to ``exp(peak)``; ``top`` is the largest of ``logits [count]``, which go on to a
    multiple of 16 with numbers of at most ``LOWEST``. ``near [2, count rounded up to that]`` is for use here.
    """
    # tokens below start weigh less than (mass - need) / count each: without them need is still reached
    low, tiles = top, (count + LANES - 1) // LANES
    if need > 0:
        low = min(top, peak + np.float32(np.log(max(mass - need, _SMALLEST) / count)))
    found, wider = _collect(logits, tiles, low, near), np.float32(2)
    while found < min_keep:
        low -= wider
        wider *= np.float32(2)
        found = _collect(logits, tiles, low, near)
    for i in range(found):
        near[1, i] = fast_exp(near[0, i] - peak)
    high, sure_mass, sure_count = top, np.float32(0), np.int64(0)
    for _ in range(_ROUNDS):
        low, high = _bisect(near, found, low, high, need - sure_mass, min_keep - sure_count)
        # what is at or above high is kept whatever follows; what is below low never
        mass_above, count_above = _above(near, found, high)
        sure_mass += mass_above
        sure_count += count_above
        _pad(near[0], found)
        row, masses, tiles = near[0].ctypes.data, near[1].ctypes.data, (found + LANES - 1) // LANES
        found = compress_between(row, masses, tiles, low, high, row, masses)
    return low


@fast
def _collect(logits, tiles, low, near):
    """Gather the tokens at or above ``low``; return how many."""
    row, target = logits.ctypes.data, near[0].ctypes.data
    return compress_between(row, row, tiles, low, _HIGHEST, target, near[1].ctypes.data)


@fast
def _bisect(near, count, low, high, need, min_keep):
    """Halve the interval of the largest limit that keeps ``need`` of the mass and ``min_keep`` tokens."""
    for _ in range(_HALVINGS):
        middle = low + (high - low) * np.float32(0.5)
        mass, kept = _above(near, count, middle)
        if mass >= need and kept >= min_keep:
            low = middle
        else:
            high = middle
    return low, high


@fast
def _above(near, count, limit):
    """Mass and number of the tokens at or above ``limit``."""
    logits, masses = near[0], near[1]
    mass, kept = np.float32(0), np.float32(0)  # counts of float32 fill vectors of 16 and are exact to 2^24
    for i in range(count):
        is_kept = logits[i] >= limit
        mass += masses[i] if is_kept else np.float32(0)
        kept += np.float32(1) if is_kept else np.float32(0)
    return mass, np.int64(kept)


@inlined
def _pad(row, count):
    """Fill a row up to a multiple of 16."""
    for i in range(count, (count + LANES - 1) // LANES * LANES):
        row[i] = LOWEST


@fast
def mass_of(logits, count, peak):
    """Sum of ``exp(logits - peak)``; the logits go on as those of ``find_threshold``."""
    return sum_of_weights(logits.ctypes.data, (count + LANES - 1) // LANES, _LOG2_E, peak)


@fast
def largest(x, first, last):
    """Largest of ``x[first:last]``; the vector part is code of ours, as LLVM does not vectorize a maximum."""
    vectors = (last - first) // LANES
    top = largest_of_vectors(x.ctypes.data + 4 * first, vectors)
    for i in range(first + LANES * vectors, last):
        top = max(top, x[i])
    return top
