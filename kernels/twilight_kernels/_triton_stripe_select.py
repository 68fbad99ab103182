"""The fewest stripes that keep enough of the sampled rows, on GPUs: one program a strip and KV head.

The bar is found as the definition finds it, level by level, but only the keys that can matter are weighed: a row is
judged by what the other rows would choose, which is less than the whole column, so at a bar no key counts whose column
is below it. Keys above a guess are listed once, and the guess is lowered until the listed ones suffice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._reference_prefill import RETRIEVED
from ._triton_stripe_mass import weigh
from ._triton_strips import load_rows, load_sampled, place_strip, place_stripes

_LEVEL = tl.constexpr(1 << 21)  # a quarter of an octave, as in the definition
_RETRIEVED = tl.constexpr(RETRIEVED)
_GUESS = tl.constexpr(8)  # levels below what columns alone allow
_LIST_STAGES = tl.constexpr(5)  # of a loop over a list: its own load takes half of them
_STEP = tl.constexpr(4)  # levels that a guess is lowered by
_ALIGNED = tl.constexpr(16)  # numbers; threads take neighbours from such addresses on, so scans cost less
_NO_LIST = tl.constexpr(1 << 20)


@triton.jit
def choose_kernel(
    query, keys, padding, lse, base, column, listed, kept, mask, report, q_batch, q_head, q_row, k_batch, k_head,
    k_row, first_strip, strips, rows, total, lane, factor, alpha, floor,
    KV_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, DIM: tl.constexpr, STRIP: tl.constexpr, SAMPLES: tl.constexpr,
    SLOTS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SPAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Mark the stripes of a strip in ``mask`` and report on them; scratch is the program's own."""
    strip = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    task = tl.program_id(1).to(tl.int64)
    b, k = task // KV_HEADS, task % KV_HEADS
    n = first_strip + strip
    pad, start, first, end = place_strip(padding, b, n, rows, total, STRIP)
    if first >= end:
        return
    low_key, high_key = place_stripes(pad, first, WINDOW, SINKS)
    query += b * q_batch + k * Q_PER_KV * q_head
    keys += b * k_batch + k * k_head
    place = task * tl.num_programs(0) + strip
    column += place * lane
    listed += place * lane
    line = place * (CHUNKS * HEADS * SLOTS) + tl.arange(0, CHUNKS * HEADS * SLOTS)
    is_row = tl.load(lse + line) < float("inf")
    count = tl.sum(is_row.to(tl.int32), 0)
    always = tl.load(base + line)
    always_mean = tl.sum(always, 0) / count
    fewest = _twentieth(count)
    highest = _level_of(_largest(column, low_key, high_key, SPAN)) + 1
    low, high = tl.zeros((), tl.int32), highest
    if alpha < 1.0:
        if (always_mean >= alpha) & (_below(always, is_row, floor) < fewest):
            low = highest
        else:
            needed = (alpha - always_mean) * count
            high = tl.minimum(_reach(column, low_key, high_key, needed, highest, SPAN) + 3, highest)
    else:
        high = low
    guess, is_found, reach, length = tl.maximum(high - _GUESS, 1), low > 0, low * 0 + _NO_LIST, low * 0
    is_open, level, mean = low == low, low, always_mean
    while is_open:
        is_open = high - low > 1
        level = tl.where(is_open, tl.where(is_found, (low + high) // 2, guess), low)
        if level < reach:
            length = _list(column, listed, low_key, high_key, _bar(level), SPAN)
            reach = level
            tl.debug_barrier()
        for chunk in range(CHUNKS):
            found = _keep(
                query, keys, lse, listed, place, chunk, start, first, end, total - rows, q_row, q_head, k_row, length,
                _bar(level), factor, count // Q_PER_KV,
                Q_PER_KV, DIM, STRIP, SAMPLES, SLOTS, HEADS, CHUNKS, BLOCK_D, BLOCK_S, PRECISION,
            )  # fmt: skip
            own = (place * CHUNKS + chunk) * (HEADS * SLOTS) + tl.arange(0, HEADS * SLOTS)
            tl.store(kept + own, found + tl.load(base + own))
        tl.debug_barrier()
        found = tl.load(kept + line)
        mean = tl.sum(tl.where(is_row, found, 0.0), 0) / count
        is_enough = (mean >= alpha) & (_below(found, is_row, floor) < fewest)
        is_found = is_found | is_enough
        low = tl.where(is_open & is_enough, level, low)
        high = tl.where(is_open & ~is_enough, level, high)
        guess = tl.maximum(level - _STEP, 1)
        tl.debug_barrier()
    retrieving = low * 0
    length = _list(column, listed, low_key, high_key, _RETRIEVED, SPAN)
    tl.debug_barrier()
    for chunk in range(CHUNKS):
        retrieving += _retrievals(
            query, keys, lse, column, listed, place, chunk, start, first, end, total - rows, q_row, q_head, k_row,
            length, factor, Q_PER_KV, DIM, STRIP, SAMPLES, SLOTS, HEADS, CHUNKS, BLOCK_D, BLOCK_S, PRECISION,
        )  # fmt: skip
    place = task * strips + n
    mask += place * ((total + 7) // 8)
    number = _mark(column, mask, low_key, high_key, _bar(low), SPAN)
    least = _smallest(tl.where(is_row, tl.load(kept + line), float("inf")), fewest, CHUNKS * HEADS * SLOTS)
    report += place * 5
    tl.store(report, number.to(tl.float32))
    tl.store(report + 1, always_mean)
    tl.store(report + 2, mean)
    tl.store(report + 3, least)
    tl.store(report + 4, retrieving / count)


@triton.jit
def _weigh_listed(
    query, keys, lse, listed, lines, tile, whole, chunk, at, start, first, end, lead, q_row, q_head, k_row,
    length, factor,
    Q_PER_KV: tl.constexpr, DIM: tl.constexpr, STRIP: tl.constexpr, SAMPLES: tl.constexpr, SLOTS: tl.constexpr,
    HEADS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weigh the listed keys from ``at`` on.

    Returns keys ``[S]``, which of them are there, their weights ``[S, HEADS, SLOTS]``, and those of a row, its heads
    together, ``[S, SLOTS]``.
    """
    entry = at + tl.arange(0, BLOCK_S)
    is_listed = entry < length
    key = tl.load(listed + entry, mask=is_listed, other=0)
    found = load_rows(keys, key, None, k_row, DIM, BLOCK_D)
    weights = tl.reshape(weigh(tile, found, whole, factor, PRECISION), (BLOCK_S, HEADS, SLOTS))
    own = tl.sum(weights, 1)
    if CHUNKS > 1:
        for other in range(CHUNKS):
            if other != chunk:
                more, _, _ = load_sampled(
                    query, other, start, first, end, lead, q_row, q_head, Q_PER_KV, DIM, STRIP, SAMPLES, SLOTS,
                    HEADS, BLOCK_D,
                )  # fmt: skip
                rest = weigh(more, found, tl.load(lse + lines + other * HEADS * SLOTS), factor, PRECISION)
                own += tl.sum(tl.reshape(rest, (BLOCK_S, HEADS, SLOTS)), 1)
    return key, is_listed, weights, own


@triton.jit
def _keep(
    query, keys, lse, listed, place, chunk, start, first, end, lead, q_row, q_head, k_row, length, bar, factor, count,
    Q_PER_KV: tl.constexpr, DIM: tl.constexpr, STRIP: tl.constexpr, SAMPLES: tl.constexpr, SLOTS: tl.constexpr,
    HEADS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return what each line of a chunk keeps of the listed keys that its row's neighbours would choose."""
    lines = place * (CHUNKS * HEADS * SLOTS) + tl.arange(0, HEADS * SLOTS)
    tile, _, _ = load_sampled(
        query, chunk, start, first, end, lead, q_row, q_head, Q_PER_KV, DIM, STRIP, SAMPLES, SLOTS, HEADS, BLOCK_D
    )
    whole = tl.load(lse + lines + chunk * HEADS * SLOTS)
    kept = tl.zeros((BLOCK_S, HEADS, SLOTS), tl.float32)
    for at in tl.range(0, length, BLOCK_S, num_stages=_LIST_STAGES):
        _key, is_listed, weights, own = _weigh_listed(
            query, keys, lse, listed, lines, tile, whole, chunk, at, start, first, end, lead, q_row, q_head, k_row,
            length, factor, Q_PER_KV, DIM, STRIP, SAMPLES, SLOTS, HEADS, CHUNKS, BLOCK_D, BLOCK_S, PRECISION,
        )  # fmt: skip
        others = tl.sum(own, 1)[:, None] - tl.where(count > 1, own, 0.0)  # a lone row has no others
        kept += tl.where(((others >= bar) & is_listed[:, None])[:, None, :], weights, 0.0)
    return tl.reshape(tl.sum(kept, 0), (HEADS * SLOTS,))


@triton.jit
def _retrievals(
    query, keys, lse, column, listed, place, chunk, start, first, end, lead, q_row, q_head, k_row, length, factor,
    Q_PER_KV: tl.constexpr, DIM: tl.constexpr, STRIP: tl.constexpr, SAMPLES: tl.constexpr, SLOTS: tl.constexpr,
    HEADS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Count a chunk's lines that find a quarter of their mass in a listed key which is mostly their row's."""
    lines = place * (CHUNKS * HEADS * SLOTS) + tl.arange(0, HEADS * SLOTS)
    tile, _, _ = load_sampled(
        query, chunk, start, first, end, lead, q_row, q_head, Q_PER_KV, DIM, STRIP, SAMPLES, SLOTS, HEADS, BLOCK_D
    )
    whole = tl.load(lse + lines + chunk * HEADS * SLOTS)
    best = tl.zeros((BLOCK_S, HEADS, SLOTS), tl.float32)
    for at in tl.range(0, length, BLOCK_S, num_stages=_LIST_STAGES):
        key, is_listed, weights, own = _weigh_listed(
            query, keys, lse, listed, lines, tile, whole, chunk, at, start, first, end, lead, q_row, q_head, k_row,
            length, factor, Q_PER_KV, DIM, STRIP, SAMPLES, SLOTS, HEADS, CHUNKS, BLOCK_D, BLOCK_S, PRECISION,
        )  # fmt: skip
        mass = tl.load(column + key, mask=is_listed, other=float("inf"))
        best = tl.maximum(best, tl.where((own > 0.5 * mass[:, None])[:, None, :], weights, 0.0))
    best_of_line = tl.reshape(tl.max(best, 0), (HEADS * SLOTS,))
    return tl.sum((best_of_line >= _RETRIEVED).to(tl.int32), 0)


@triton.jit
def _bar(level):
    """The column mass at which a level begins; level 0 is everything."""
    return tl.where(level > 0, (level * _LEVEL).to(tl.float32, bitcast=True), -1.0)


@triton.jit
def _level_of(mass):
    return mass.to(tl.int32, bitcast=True) // _LEVEL


@triton.jit
def _twentieth(count):
    """A twentieth of ``count`` as Python rounds it, at least 1."""
    whole, rest = count // 20, count % 20
    return tl.maximum(whole + tl.where(rest == 10, whole & 1, (rest > 10).to(tl.int32)), 1)


@triton.jit
def _below(found, is_row, floor):
    return tl.sum(((found < floor) & is_row).to(tl.int32), 0)


@triton.jit
def _smallest(found, rank, SIZE: tl.constexpr):
    """The ``rank``-th smallest, from 1."""
    index = tl.arange(0, SIZE)
    for _ in range(1, rank):
        found = tl.where(index == tl.argmin(found, 0), float("inf"), found)
    return tl.min(found, 0)


@triton.jit
def _largest(column, low, high, SPAN: tl.constexpr):
    found = tl.zeros((SPAN,), tl.float32)
    for at in range(low // _ALIGNED * _ALIGNED, high, SPAN):
        found = tl.maximum(found, _masses(column, at, low, high, SPAN))
    return tl.max(found, 0)


@triton.jit
def _reach(column, low, high, needed, highest, SPAN: tl.constexpr):
    """The highest level at which columns that reach its bar carry ``needed``; no row set keeps more than they."""
    below, above = highest * 0, highest
    while above - below > 1:
        middle = (below + above) // 2
        bar, total = _bar(middle), tl.zeros((SPAN,), tl.float32)
        for at in range(low // _ALIGNED * _ALIGNED, high, SPAN):
            mass = _masses(column, at, low, high, SPAN)
            total += tl.where(mass >= bar, mass, 0.0)
        is_enough = tl.sum(total, 0) >= needed
        below, above = tl.where(is_enough, middle, below), tl.where(is_enough, above, middle)
    return below


@triton.jit
def _list(column, listed, low, high, bar, SPAN: tl.constexpr):
    """Write the keys whose column reaches ``bar``, in order; return how many."""
    length = low * 0
    for at in range(low // _ALIGNED * _ALIGNED, high, SPAN):
        key = at + tl.arange(0, SPAN)
        is_in = _masses(column, at, low, high, SPAN) >= bar
        place = length + tl.cumsum(is_in.to(tl.int32), 0) - 1
        tl.store(listed + place, key, mask=is_in)
        length += tl.sum(is_in.to(tl.int32), 0)
    return length


@triton.jit
def _masses(column, at, low, high, SPAN: tl.constexpr):
    """Column masses of the keys from ``at`` on, and -2, below any bar, where a key is not in the range."""
    key = at + tl.arange(0, SPAN)
    return tl.load(column + key, mask=(key >= low) & (key < high), other=-2.0)


@triton.jit
def _mark(column, mask, low, high, bar, SPAN: tl.constexpr):
    """Set the bit of each key whose column reaches ``bar`` and is not zero; return how many there are."""
    number = low * 0
    bit = tl.arange(0, 8)
    for at in range(low // 8, (high + 7) // 8, SPAN // 8):
        byte = at + tl.arange(0, SPAN // 8)
        key = byte[:, None] * 8 + bit[None, :]
        is_there = (key >= low) & (key < high)
        mass = tl.load(column + key, mask=is_there, other=0.0)
        is_in = (is_there & (mass >= bar) & (mass > 0)).to(tl.int32)
        tl.store(mask + byte, tl.sum(is_in << bit[None, :], 1).to(tl.uint8), mask=byte * 8 < high)
        number += tl.sum(tl.sum(is_in, 1), 0)
    return number
