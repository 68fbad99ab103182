"""Adding up the parts of a decode step's softmax on GPUs, and counting what the step did."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import segment

SLOT_TILE = 16  # parts that are read at once
LISTED_TILE = 64  # listed pages that are counted at once


@triton.jit(do_not_specialize=["runs", "num_listed", "min_sparse_len"])
def merge_kernel(
    parts, tops, sums, out, num_pages, candidates, candidate_tokens, num_listed, limit_counts, kept, masses, stats,
    min_sparse_len, heads, slots, runs, PER_KV: tl.constexpr, DV: tl.constexpr, VP: tl.constexpr, PAGE: tl.constexpr,
    PRUNES: tl.constexpr, HAS_PAGES: tl.constexpr, HAS_TOKENS: tl.constexpr, HAS_STATS: tl.constexpr,
    SLOTS: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one query head by log-sum-exp, in the order of their slots."""
    head = tl.program_id(0)
    pair, g, row = head // PER_KV, head % PER_KV, head // heads
    pages = tl.load(num_pages + row)
    sparse = pages * PAGE >= min_sparse_len
    count = pages
    if HAS_PAGES:
        count = tl.where(sparse, num_listed, count)
    slot = tl.arange(0, SLOTS)
    first, _last = segment(count, tl.maximum(slot - runs, 0), SPLITS, LEAST)
    exists = (slot < runs) | ((slot < slots) & (first < count))
    used = tl.sum(exists.to(tl.int32), 0)  # they come first
    base = pair.to(tl.int64) * slots
    part_tops = tl.load(tops + (base + slot) * PER_KV + g, mask=exists, other=float("-inf"))
    part_sums = tl.load(sums + (base + slot) * PER_KV + g, mask=exists, other=0.0)
    top = tl.max(part_tops, 0)  # plain tokens are never none
    total = tl.sum(part_sums * tl.exp(part_tops - top), 0)
    d = tl.arange(0, VP)
    acc = tl.zeros([VP], tl.float32)
    for begin in range(0, used, TILE):
        at = begin + tl.arange(0, TILE)
        place = (base + at) * PER_KV + g
        weight = tl.exp(tl.load(tops + place, mask=at < used, other=float("-inf")) - top)
        mask = (at < used)[:, None] & (d < DV)[None, :]
        acc += tl.sum(tl.load(parts + place[:, None] * DV + d[None, :], mask=mask, other=0.0) * weight[:, None], 0)
    tl.store(out + head.to(tl.int64) * DV + d, acc / total, mask=d < DV)
    if HAS_STATS:
        scored = pages * PAGE
        listed = scored
        if HAS_PAGES and sparse:
            scored, listed = count_listed(candidates, candidate_tokens, pair, num_listed, PAGE, HAS_TOKENS, LISTED)
        own = listed
        union = listed
        share = tl.full([], 1.0, tl.float32)
        if PRUNES and sparse:
            split = tl.arange(0, SPLITS)
            start, _end = segment(count, split, SPLITS, LEAST)
            union = tl.sum(tl.load(kept + pair * SPLITS + split, mask=start < count, other=0), 0)
            own = tl.load(limit_counts + head)
            share = tl.exp(top + tl.log(total) - tl.load(masses + head))
        place = stats + head.to(tl.int64) * 5
        tl.store(place, tl.load(place) + scored)
        tl.store(place + 1, tl.load(place + 1) + own)
        tl.store(place + 2, tl.load(place + 2) + union)
        tl.store(place + 3, tl.load(place + 3) + share)
        tl.store(place + 4, tl.load(place + 4) + listed)


@triton.jit
def count_listed(
    candidates, candidate_tokens, pair, num_listed, PAGE: tl.constexpr, HAS_TOKENS: tl.constexpr, LISTED: tl.constexpr
):
    """Tokens of the pages that hold candidates, and the candidates among them."""
    scored = 0
    listed = 0
    for begin in range(0, num_listed, LISTED):
        position = begin + tl.arange(0, LISTED)
        spot = candidates + pair.to(tl.int64) * num_listed + position
        exists = tl.load(spot, mask=position < num_listed, other=-1) >= 0
        if HAS_TOKENS:
            t = tl.arange(0, PAGE)
            flag = candidate_tokens + (pair.to(tl.int64) * num_listed + position)[:, None] * PAGE + t[None, :]
            many = tl.sum((tl.load(flag, mask=exists[:, None], other=0) != 0).to(tl.int32), 1)
            scored += tl.sum((many > 0).to(tl.int32), 0) * PAGE
            listed += tl.sum(many, 0)
        else:
            scored += tl.sum(exists.to(tl.int32), 0) * PAGE
            listed += tl.sum(exists.to(tl.int32), 0) * PAGE
    return scored, listed
