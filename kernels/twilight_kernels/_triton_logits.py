"""Logits of the rows that a decode step prunes on GPUs, with the largest and the mass of each split."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_attend import is_pruned
from ._triton_keys import load_key_query, score_pages
from ._triton_tiles import exponential, segment


@triton.jit(do_not_specialize=["min_sparse_len", "columns", "num_listed"])
def logits_kernel(
    query, row_stride, head_stride, codes, lows, steps, table, columns, num_pages, candidates, candidate_tokens,
    num_listed, out, tops, sums, tokens, scaling, min_sparse_len, kv_heads, PER_KV: tl.constexpr, M: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr,
    HAS_PAGES: tl.constexpr, HAS_TOKENS: tl.constexpr, T: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """Score one split of the pages of one KV head for all its query heads; what is no candidate is ``-inf``."""
    pair, split = tl.program_id(0), tl.program_id(1)
    row, kv_head = pair // kv_heads, pair % kv_heads
    count = tl.load(num_pages + row)
    is_listed = is_pruned(num_pages, row, min_sparse_len, PAGE)
    if HAS_PAGES:
        count = tl.where(is_listed, num_listed, count)
    first, last = segment(count, split, SPLITS, LEAST)
    q, low_q, patterns, q_unit = load_key_query(
        query, row_stride, head_stride, row, kv_head, scaling, PER_KV, M, D, DP, RP, PAGE, BITS, LANES
    )  # fmt: skip
    g = tl.arange(0, M)
    head_row = out + (pair.to(tl.int64) * PER_KV + g) * tokens
    # of each place in a tile, so that threads are compared and added up once, at the end
    top = tl.full([LANES, M, T], float("-inf"), tl.float32)
    total = tl.zeros([LANES, M, T], tl.float32)
    parts: tl.constexpr = PAGE // T if LANES == 1 else 1  # of a page, one at a time
    for begin in range(first * parts, last * parts, LANES):
        position, offset = (begin + tl.arange(0, LANES)) // parts, begin % parts * T
        within = position < last
        page, exists = position, within
        spot = pair.to(tl.int64) * num_listed + position
        if HAS_PAGES:
            page = tl.where(
                is_listed, tl.load(candidates + spot, mask=position < tl.where(is_listed, last, 0), other=-1), position
            )
            exists = within & (page >= 0)
        slot = tl.load(table + row.to(tl.int64) * columns + page, mask=exists, other=0)
        exists = exists & (slot >= 0)
        page_head = slot.to(tl.int64) * kv_heads + kv_head
        tiles = score_pages(
            q, low_q, patterns, q_unit, codes, lows, steps, page_head, exists, offset, D, DP, PAGE, BITS, T, LANES
        )  # fmt: skip
        scored = ()
        new_top = top
        for k in tl.static_range(PAGE // T // parts):
            t = offset + k * T + tl.arange(0, T)
            logits = tiles[k]
            if HAS_TOKENS:
                mask = exists[:, None] & (t < tl.where(is_listed, PAGE, 0))[None, :]
                taken = tl.load(candidate_tokens + spot[:, None] * PAGE + t[None, :], mask=mask, other=1) != 0
                logits = tl.where(taken[:, None, :], logits, float("-inf"))
            place = head_row[None, :, None] + (position[:, None] * PAGE + t[None, :])[:, None, :]
            tl.store(place, logits, mask=within[:, None, None] & (g < PER_KV)[None, :, None])
            new_top = tl.maximum(new_top, logits)
            scored = scored + (logits,)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * exponential(top - base)
        for k in tl.static_range(PAGE // T // parts):
            total += exponential(scored[k] - base)
        top = new_top
    best = tl.max(tl.max(top, 2), 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    whole = tl.sum(tl.sum(total * exponential(top - base[None, :, None]), 2), 0)
    place = (pair * SPLITS + split) * PER_KV + g
    tl.store(tops + place, best, mask=g < PER_KV)
    tl.store(sums + place, whole, mask=g < PER_KV)
