"""What sampled query rows attend to, on GPUs: their log-sum-exp, and the mass of every key that may be a stripe.

Two passes over the keys, because weights need their row's sum. Neighbouring strips share what is read of the keys, and
tiles of keys that all lines see are not masked. Logarithms are to base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_strips import load_rows, load_sampled, load_tile, place_group, place_stripes


@triton.jit
def lse_kernel(
    query, keys, padding, lse, base, q_batch, q_head, q_row, k_batch, k_head, k_row, first_strip, strips, rows, total,
    factor,
    KV_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, DIM: tl.constexpr, STRIP: tl.constexpr, SAMPLES: tl.constexpr,
    SLOTS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """Write each sampled row's log-sum-exp, infinite where there is no row, and its mass of sinks and window."""
    group = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    task, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, k = task // KV_HEADS, task % KV_HEADS
    pad, begin, number = place_group(padding, b, group, first_strip, rows, total, STRIP, STRIPS)
    if (begin >= total) | (number >= strips):
        return
    line = tl.arange(0, STRIPS * HEADS * SLOTS)
    own = line // (HEADS * SLOTS)
    first = tl.maximum(begin + own * STRIP, total - rows)
    tile, position, is_row = load_sampled(
        query + b * q_batch + k * Q_PER_KV * q_head, chunk, begin + own * STRIP, first,
        tl.minimum(begin + own * STRIP + STRIP, total), total - rows, q_row, q_head,
        Q_PER_KV, DIM, STRIP, SAMPLES, SLOTS, HEADS, BLOCK_D, STRIPS,
    )  # fmt: skip
    stripes, slab = place_stripes(pad, first, WINDOW, SINKS)
    seen, shared = place_stripes(pad, begin, WINDOW, SINKS)  # keys that all lines see, and none has in its window
    keys += b * k_batch + k * k_head
    top = tl.full((STRIPS * HEADS * SLOTS,), float("-inf"), tl.float32)
    mass = tl.zeros((STRIPS * HEADS * SLOTS,), tl.float32)
    for at in range(shared, tl.minimum(begin + STRIPS * STRIP, total), BLOCK_S):
        top, mass = _add(
            tile, slab, position + 1, keys, k_row, at, total, top, mass, factor, DIM, BLOCK_D, BLOCK_S, PRECISION
        )
    for at in range(pad, tl.minimum(pad + SINKS, total), BLOCK_S):
        top, mass = _add(
            tile, stripes * 0, stripes, keys, k_row, at, total, top, mass, factor, DIM, BLOCK_D, BLOCK_S, PRECISION
        )
    always = top * factor + tl.log2(mass)
    masked = seen + (shared - seen) // BLOCK_S * BLOCK_S
    for at in range(seen, masked, BLOCK_S):
        found = load_tile(keys, at, k_row, DIM, BLOCK_S, BLOCK_D)
        logits = tl.dot(tile, tl.trans(found), input_precision=PRECISION)
        top, mass = _fold(logits, top, mass, factor)
    _, last = place_stripes(pad, tl.maximum(begin + (STRIPS - 1) * STRIP, total - rows), WINDOW, SINKS)
    for at in range(masked, tl.minimum(last, total), BLOCK_S):
        top, mass = _add(
            tile, stripes, slab, keys, k_row, at, total, top, mass, factor, DIM, BLOCK_D, BLOCK_S, PRECISION
        )
    whole = top * factor + tl.log2(mass)
    place = ((task * strips + number + own) * CHUNKS + chunk) * (HEADS * SLOTS) + line % (HEADS * SLOTS)
    is_own = (number + own >= 0) & (number + own < strips)
    tl.store(lse + place, tl.where(is_row, whole, float("inf")), mask=is_own)
    tl.store(base + place, tl.where(is_row, tl.exp2(always - whole), 0.0), mask=is_own)


@triton.jit
def _add(
    tile, low, high, keys, stride, at, total, top, mass, factor,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add those of a tile's keys to running softmax sums that each line counts: from its ``low`` to before ``high``."""
    key = at + tl.arange(0, BLOCK_S)
    found = load_rows(keys, key, key < total, stride, DIM, BLOCK_D)
    logits = tl.dot(tile, tl.trans(found), input_precision=PRECISION)
    is_in = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
    return _fold(tl.where(is_in, logits, float("-inf")), top, mass, factor)


@triton.jit
def _fold(logits, top, mass, factor):
    """Add a tile of logits ``[L, S]`` to running softmax sums ``[L]``."""
    higher = tl.maximum(top, tl.max(logits, 1))
    unit = tl.where(higher == float("-inf"), 0.0, higher) * factor  # a line that saw no key yet
    mass = mass * tl.exp2(top * factor - unit) + tl.sum(tl.exp2(logits * factor - unit[:, None]), 1)
    return higher, mass


@triton.jit
def column_kernel(
    query, keys, padding, lse, column, q_batch, q_head, q_row, k_batch, k_head, k_row, first_strip, strips, rows,
    total, lane, factor,
    KV_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, DIM: tl.constexpr, STRIP: tl.constexpr, SAMPLES: tl.constexpr,
    SLOTS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SPAN: tl.constexpr, PRECISION: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """Write the mass of ``SPAN`` keys that may be stripes of a group's strips, added up over a strip's sampled rows."""
    task = tl.program_id(2).to(tl.int64)
    b, k = task // KV_HEADS, task % KV_HEADS
    pad, begin, number = place_group(padding, b, tl.program_id(1), first_strip, rows, total, STRIP, STRIPS)
    last = place_stripes(pad, tl.maximum(begin + (STRIPS - 1) * STRIP, total - rows), WINDOW, SINKS)[1]
    low = pad + SINKS + tl.program_id(0) * SPAN
    high = tl.minimum(low + SPAN, tl.minimum(last, total))  # behind a strip's own last stripe nobody reads
    if (begin >= total) | (number >= strips) | (low >= high):
        return
    keys += b * k_batch + k * k_head
    strip = tl.arange(0, STRIPS)
    is_own = (number + strip >= 0) & (number + strip < strips)
    column += (task * strips + number + strip) * lane
    line = tl.arange(0, STRIPS * HEADS * SLOTS)
    own = line // (HEADS * SLOTS)
    lse += (task * strips + number + own) * (CHUNKS * HEADS * SLOTS) + line % (HEADS * SLOTS)
    for chunk in range(CHUNKS):
        tile, _, _ = load_sampled(
            query + b * q_batch + k * Q_PER_KV * q_head, chunk, begin + own * STRIP,
            tl.maximum(begin + own * STRIP, total - rows), tl.minimum(begin + own * STRIP + STRIP, total),
            total - rows, q_row, q_head, Q_PER_KV, DIM, STRIP, SAMPLES, SLOTS, HEADS, BLOCK_D, STRIPS,
        )  # fmt: skip
        is_line = (number + own >= 0) & (number + own < strips)
        whole = tl.load(lse + chunk * HEADS * SLOTS, mask=is_line, other=float("inf"))
        masked = low + (high - low) // BLOCK_S * BLOCK_S
        for at in range(low, masked, BLOCK_S):
            found = load_tile(keys, at, k_row, DIM, BLOCK_S, BLOCK_D)
            to = column[None, :] + (at + tl.arange(0, BLOCK_S))[:, None]
            _add_up(weigh(tile, found, whole, factor, PRECISION), to, is_own[None, :], chunk, HEADS * SLOTS)
        if masked < high:
            key = masked + tl.arange(0, BLOCK_S)
            found = load_rows(keys, key, key < high, k_row, DIM, BLOCK_D)
            is_in = is_own[None, :] & (key < high)[:, None]
            to = column[None, :] + key[:, None]
            _add_up(weigh(tile, found, whole, factor, PRECISION), to, is_in, chunk, HEADS * SLOTS)


@triton.jit
def _add_up(weights, to, is_in, chunk, LINES: tl.constexpr):
    """Write the sums ``[S, STRIPS]`` of weights ``[S, L]`` over each strip's lines, added to earlier chunks'."""
    mass = tl.sum(tl.reshape(weights, (weights.shape[0], weights.shape[1] // LINES, LINES)), 2)
    if chunk > 0:
        mass += tl.load(to, mask=is_in, other=0.0)
    tl.store(to, mass, mask=is_in)


@triton.jit
def weigh(tile, found, whole, factor, PRECISION: tl.constexpr):
    """Softmax weights ``[S, L]`` of ``found`` keys, zero in lines that are no rows, as their ``whole`` is infinite.

    Keys are rows: what is told of a key lies in four threads, so that sums over lines are nearly free.
    """
    return tl.exp2(tl.dot(found, tl.trans(tile), input_precision=PRECISION) * factor - whole[None, :])
