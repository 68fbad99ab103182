"""Logits of the rows that a decode step prunes on GPUs, with the largest and the mass of each split."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_attend import is_pruned
from ._triton_tiles import fold_page, load_query, page_logits, segment


@triton.jit(do_not_specialize=["min_sparse_len", "columns", "num_listed"])
def logits_kernel(
    query, row_stride, head_stride, codes, lows, steps, table, columns, num_pages, candidates, candidate_tokens,
    num_listed, out, tops, sums, tokens, scaling, min_sparse_len, kv_heads, PER_KV: tl.constexpr, M: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr, HAS_PAGES: tl.constexpr,
    HAS_TOKENS: tl.constexpr, T: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Score one split of the pages of one KV head for all its query heads; what is no candidate is ``-inf``."""
    pair, split = tl.program_id(0), tl.program_id(1)
    row, kv_head = pair // kv_heads, pair % kv_heads
    if is_pruned(num_pages, row, min_sparse_len, PAGE):
        count = tl.load(num_pages + row)
        if HAS_PAGES:
            count = num_listed
        first, last = segment(count, split, SPLITS, LEAST)
        q, q_unit = load_query(query, row_stride, head_stride, row, kv_head, scaling, PER_KV, M, D, DP, BITS == 16)
        g = tl.arange(0, M)
        real = (g < PER_KV)[:, None]
        head_row = out + (pair.to(tl.int64) * PER_KV + g) * tokens
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        tiles: tl.constexpr = PAGE // T
        for step in range(first * tiles, last * tiles):
            position = step // tiles
            t = step % tiles * T + tl.arange(0, T)
            page = position
            exists = count > position
            if HAS_PAGES:
                page = tl.load(candidates + pair.to(tl.int64) * num_listed + position)
                exists = page >= 0
            slot = tl.load(table + row.to(tl.int64) * columns + page, mask=exists, other=0)
            exists = exists & (slot >= 0)
            page_head = slot.to(tl.int64) * kv_heads + kv_head
            high, rest, unit, bias = fold_page(q, lows, steps, page_head, exists, M, D, DP, BITS == 16)
            logits = page_logits(codes, page_head, exists, t, high, rest, unit, bias, q_unit, D, DP, PAGE, BITS)
            taken = t < tl.where(exists, PAGE, 0)
            if HAS_TOKENS:
                flag = candidate_tokens + (pair.to(tl.int64) * num_listed + position) * PAGE + t
                taken = taken & (tl.load(flag, mask=taken, other=0) != 0)
            logits = tl.where(taken[None, :], logits, float("-inf"))
            tl.store(head_row[:, None] + (position * PAGE + t)[None, :], logits, mask=real)
            new_top = tl.maximum(top, tl.max(logits, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
            top = new_top
        place = (pair * SPLITS + split) * PER_KV + g
        tl.store(tops + place, top, mask=g < PER_KV)
        tl.store(sums + place, total, mask=g < PER_KV)
