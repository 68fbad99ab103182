"""Attending on GPUs: plain tokens, and packed tokens that are kept; each leaves parts of a softmax.

A part is ``[BK, SLOTS, G, DV]`` sums of weighted values with their largest logit and mass ``[BK, SLOTS, G]``: slots
``0 .. PLAIN`` are runs of plain tokens, the others are splits of the packed ones. ``_triton_merge`` adds them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_gather import LEAST_LOGIT, fours, places_of
from ._triton_tiles import exponential, load_query, product, segment
from ._triton_values import add_weighed, weigh_codes, weigh_numbers
from ._triton_words import load_halves, load_rests

RUN = 256  # plain tokens of one slot


@triton.jit
def store_part(parts, tops, sums, slot, top, total, acc, M: tl.constexpr, PER_KV: tl.constexpr, DV: tl.constexpr,
               VP: tl.constexpr):  # fmt: skip
    g = tl.arange(0, M)
    d = tl.arange(0, VP)
    head = slot * PER_KV + g
    tl.store(tops + head, top, mask=g < PER_KV)
    tl.store(sums + head, total, mask=g < PER_KV)
    tl.store(parts + head[:, None] * DV + d[None, :], acc, mask=(g < PER_KV)[:, None] & (d < DV)[None, :])


@triton.jit
def is_pruned(num_pages, row, min_sparse_len, PAGE: tl.constexpr):
    return tl.load(num_pages + row) * PAGE >= min_sparse_len


@triton.jit(do_not_specialize=["min_sparse_len", "columns", "num_sinks", "sink_pages"])
def plain_kernel(
    query, row_stride, head_stride, keys, values, plain_len, plain_table, columns, num_sinks, sink_pages,
    new_key, new_key_row, new_key_head, new_value, new_value_row, new_value_head, parts, tops, sums, scaling,
    kv_heads, slots, capacity, PER_KV: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RP: tl.constexpr, DV: tl.constexpr, VP: tl.constexpr, HAS_NEW: tl.constexpr, IS_PAGED: tl.constexpr,
    RUN: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Write the step's token, and attend to one run of the plain tokens."""
    pair, run = tl.program_id(0), tl.program_id(1)
    row, kv_head = pair // kv_heads, pair % kv_heads
    length = tl.load(plain_len + row)
    q, q_unit = load_query(query, row_stride, head_stride, row, kv_head, scaling, PER_KV, M, D, DP, RP, True)
    dv = tl.arange(0, VP)
    stored = length
    if HAS_NEW:
        stored = length - 1  # the last column is read from the step's own tensors
        key_place = new_key + row.to(tl.int64) * new_key_row + kv_head * new_key_head
        value_place = new_value + row.to(tl.int64) * new_value_row + kv_head * new_value_head + dv
        last_value = tl.load(value_place, mask=dv < DV, other=0.0)
        if stored // RUN == run:
            home = pair.to(tl.int64)
            for k in tl.static_range(len(q)):
                d = k * DP + tl.arange(0, q[k].shape[1])
                last_key = tl.load(key_place + d, mask=d < D, other=0.0)
                tl.store(keys + (home * D + d) * capacity + stored, last_key, mask=d < D)
            tl.store(values + (home * capacity + stored) * DV + dv, last_value, mask=dv < DV)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, VP], tl.float32)
    for start in range(run * RUN, tl.minimum(run * RUN + RUN, length), T):
        column = start + tl.arange(0, T)
        exists = column < stored
        if IS_PAGED:
            is_sink = column < num_sinks
            page = tl.where(is_sink, column // capacity, (column - num_sinks) // capacity + sink_pages)
            offset = tl.where(is_sink, column % capacity, (column - num_sinks) % capacity)
            slot = tl.load(plain_table + row.to(tl.int64) * columns + page, mask=exists, other=0)
            home = slot.to(tl.int64) * kv_heads + kv_head
        else:
            offset = column
            home = tl.zeros([T], tl.int64) + pair
        place = values + (home * capacity + offset)[:, None] * DV + dv[None, :]
        value = tl.load(place, mask=exists[:, None] & (dv < DV)[None, :], other=0.0)
        if HAS_NEW:
            is_last = column == stored
            value = tl.where(is_last[:, None], last_value[None, :], value)
        found = tl.zeros([M, T], tl.float32)
        for k in tl.static_range(len(q)):
            d = k * DP + tl.arange(0, q[k].shape[1])
            place = keys + (home[None, :] * D + d[:, None]) * capacity + offset[None, :]
            tile = tl.load(place, mask=(d < D)[:, None] & exists[None, :], other=0.0)
            if HAS_NEW:
                last_key = tl.load(key_place + d, mask=d < D, other=0.0)
                tile = tl.where(is_last[None, :], last_key[:, None], tile)
            found += product(q[k], tile)
        logits = found * q_unit[:, None]
        logits = tl.where((column < length)[None, :], logits, float("-inf"))
        weights, top, total, acc = soften(logits, top, total, acc)
        acc = add_weighed(weights, value, acc)
    store_part(parts, tops, sums, pair.to(tl.int64) * slots + run, top, total, acc, M, PER_KV, DV, VP)


@triton.jit
def soften(logits, top, total, acc):
    """One step of the online softmax over the last axis: weights, and what was summed so far in their unit."""
    axis: tl.constexpr = len(logits.shape) - 1
    new_top = tl.maximum(top, tl.max(logits, axis))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing yet: not a number from inf - inf
    weights = tl.exp(logits - tl.expand_dims(base, axis))
    shrink = tl.exp(top - base)
    return weights, new_top, total * shrink + tl.sum(weights, axis), acc * tl.expand_dims(shrink, axis)


@triton.jit(do_not_specialize=["min_sparse_len", "columns", "num_listed", "runs"])
def kept_kernel(
    logits, split_tops, positions, limits, value_codes, value_lo, value_step, table, columns, num_pages, candidates,
    num_listed, parts, tops, sums, kept, tokens, min_sparse_len, kv_heads, slots, runs, PER_KV: tl.constexpr,
    M: tl.constexpr, DV: tl.constexpr, VP: tl.constexpr, PAGE: tl.constexpr, VALUE_BITS: tl.constexpr,
    GROUP: tl.constexpr, NARROW: tl.constexpr, FOLDS: tl.constexpr, PRUNES: tl.constexpr, HAS_PAGES: tl.constexpr,
    QUADS: tl.constexpr, T: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """List what some query head of the KV head keeps of one split, if not all, then attend to it.

    Weights are told in the unit of the split's largest logit, which is known: nothing is rescaled on the way.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    row, kv_head = pair // kv_heads, pair % kv_heads
    sparse = is_pruned(num_pages, row, min_sparse_len, PAGE)
    count = tl.load(num_pages + row)
    if HAS_PAGES:
        count = tl.where(sparse, num_listed, count)
    first, last = segment(count, split, SPLITS, LEAST)
    if first >= last:
        return
    g = tl.arange(0, M)
    real = g < PER_KV
    head_row = logits + (pair.to(tl.int64) * PER_KV + g) * tokens
    listed = positions + pair.to(tl.int64) * tokens + first * PAGE
    found = (last - first) * PAGE
    if (PRUNES or HAS_PAGES) and sparse:
        found = list_kept(logits, limits, listed, pair, tokens, first * PAGE, last * PAGE, PER_KV, PRUNES, QUADS)
    tl.store(kept + pair * SPLITS + split, found)
    top = tl.load(split_tops + (pair * SPLITS + split) * PER_KV + g, mask=real, other=float("-inf"))
    base = tl.where(top == float("-inf"), 0.0, top)
    if FOLDS:
        is_rest, is_first = load_rests(logits), 0
        if VALUE_BITS == 3:
            is_first = load_halves(logits, DV // 8)
        total = tl.zeros([LANES, T, M], tl.float32)
        acc = tl.zeros([LANES, M, VP], tl.float32)
        bias = ()
        for _group in tl.static_range((DV + GROUP - 1) // GROUP):
            bias = bias + (total,)
    else:
        total = tl.zeros([M, T], tl.float32)
        acc = tl.zeros([M, VP], tl.float32)
    for start in range(0, found, LANES * T):
        index = start + tl.arange(0, LANES)[:, None] * T + tl.arange(0, T)[None, :]
        exists = index < found
        at = first * PAGE + index
        is_listed = index < tl.where(sparse, found, 0)
        if PRUNES or HAS_PAGES:
            at = tl.where(sparse, tl.load(listed + index, mask=is_listed, other=0), at)
        page = at // PAGE
        if HAS_PAGES:
            spot = candidates + pair.to(tl.int64) * num_listed + page
            page = tl.where(sparse, tl.load(spot, mask=is_listed, other=0), page)
        slot = tl.load(table + row.to(tl.int64) * columns + page, mask=exists, other=0)
        token_head = (slot.to(tl.int64) * kv_heads + kv_head) * PAGE + at % PAGE
        if FOLDS:
            inside = exists[:, :, None] & real[None, None, :]
            x = tl.load(head_row[None, None, :] + at[:, :, None], mask=inside, other=float("-inf"))
            weights = exponential(x - base[None, None, :])
            total += weights
            acc, bias = weigh_codes(
                weights, acc, bias, value_codes, value_lo, value_step, token_head, exists, is_rest, is_first, DV,
                VALUE_BITS, GROUP,
            )  # fmt: skip
        else:
            inside = real[:, None] & exists
            x = tl.load(head_row[:, None] + at, mask=inside, other=float("-inf"))
            weights = exponential(x - base[:, None])
            total += weights
            acc += weigh_numbers(
                weights, value_codes, value_lo, value_step, token_head.reshape(T), exists.reshape(T), DV, VP,
                VALUE_BITS, GROUP, NARROW,
            )  # fmt: skip
    if FOLDS:
        whole = tl.sum(tl.sum(total, 1), 0)
        acc = tl.sum(acc, 0)
        d = tl.arange(0, VP)
        for group in tl.static_range((DV + GROUP - 1) // GROUP):
            low = tl.sum(tl.sum(bias[group], 1), 0)
            acc += tl.where((d // GROUP == group)[None, :], low[:, None], 0.0)
    else:
        whole = tl.sum(total, 1)
    slot = pair.to(tl.int64) * slots + runs + split
    store_part(parts, tops, sums, slot, tl.where(whole > 0.0, top, float("-inf")), whole, acc, M, PER_KV, DV, VP)


@triton.jit
def list_kept(
    logits, limits, listed, pair, tokens, first, last, PER_KV: tl.constexpr, PRUNES: tl.constexpr, QUADS: tl.constexpr
):
    """Write which tokens ``first .. last`` some head keeps, a thread's after another's; return how many."""
    rows, limit = logits + pair.to(tl.int64) * PER_KV * tokens, ()
    for g in tl.static_range(PER_KV):
        least = tl.load(limits + pair * PER_KV + g) if PRUNES else LEAST_LOGIT
        limit = limit + (tl.maximum(least, LEAST_LOGIT),)
    found = 0
    for start in range(first, last, 4 * QUADS):
        at = start + fours(QUADS)
        needed = tl.zeros([4, QUADS], tl.int1)
        for g in tl.static_range(PER_KV):
            x = tl.load(rows + g * tokens.to(tl.int64) + at, mask=at < last, other=float("-inf"))
            needed = needed | (x >= limit[g])
        places, found = places_of((needed.to(tl.int32),), found)
        tl.store(listed + places[0], at, mask=needed)
    tl.debug_barrier()  # the list is read by other threads than those that wrote it
    return found
