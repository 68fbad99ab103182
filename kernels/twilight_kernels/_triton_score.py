"""Scoring packed keys on GPUs: Quest's bound of a page, its estimated mass, the logits of all tokens.

Definitions: the functions of ``_reference`` of the same names. A block of threads takes one KV head and a split of
the row's pages, all query heads of the KV head together.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_keys import load_key_query, score_launch, score_pages, score_shape
from ._triton_tiles import (
    FUSED,
    LEAST_TOKENS,
    REGISTERS,
    SPLITS,
    channel_parts,
    grid_splits,
    last_contiguous,
    segment,
)
from .layout import KeyPages


def page_scores(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float) -> Tensor:
    """See ``_reference.page_scores``."""
    return _judge_pages(query, pages, block_table, num_pages, scaling, is_mass=False)


def page_masses(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float) -> Tensor:
    """See ``_reference.page_masses``."""
    return _judge_pages(query, pages, block_table, num_pages, scaling, is_mass=True)


def key_logits(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float) -> Tensor:
    """See ``_reference.key_logits``."""
    _, kv_heads, dim, page_size = pages.form
    rows, heads, _ = query.shape
    columns = block_table.shape[1]
    out = torch.full((rows, heads, columns * page_size), -math.inf, device=query.device)
    if not out.numel():
        return out
    query, table = last_contiguous(query), block_table.contiguous()
    least = max(1, LEAST_TOKENS // page_size)
    shape = score_shape(page_size, dim, pages.codec.bits, heads // kv_heads)
    with torch.cuda.device_of(query):
        _key_logits_kernel[(rows * kv_heads, grid_splits(columns, least))](
            query, *query.stride()[:2], pages.codes, pages.lo, pages.step, table, columns, num_pages.contiguous(),
            out, scaling, kv_heads, **shape, SPLITS=SPLITS, LEAST=least,
            **score_launch(shape),
        )  # fmt: skip
    return out


def _judge_pages(
    query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float, *, is_mass: bool
) -> Tensor:
    _, kv_heads, dim, page_size = pages.form
    rows, heads, _ = query.shape
    columns = block_table.shape[1]
    out = torch.empty(rows, heads, columns, device=query.device)
    if not out.numel():
        return out
    query, table = last_contiguous(query), block_table.contiguous()
    tokens = math.log(page_size)
    with torch.cuda.device_of(query):
        _judge_kernel[(rows * kv_heads, triton.cdiv(columns, _PAGES))](
            query, *query.stride()[:2], pages.codes, pages.lo, pages.step, table, columns, num_pages.contiguous(),
            out, scaling, tokens, math.sqrt(2 * tokens), kv_heads, PER_KV=heads // kv_heads,
            **channel_parts(dim), PAGE=page_size, LEVELS=0 if pages.codec.is_raw else pages.codec.levels,
            IS_MASS=is_mass, PAGES=_PAGES, num_warps=4, num_stages=2, maxnreg=REGISTERS, **FUSED,
        )  # fmt: skip
    return out


_PAGES = 16  # pages whose bounds are read at once


@triton.jit(do_not_specialize=["columns"])
def _key_logits_kernel(
    query, row_stride, head_stride, codes, lows, steps, table, columns, num_pages, out, scaling, kv_heads,
    PER_KV: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, PAGE: tl.constexpr,
    BITS: tl.constexpr, T: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row, kv_head = pair // kv_heads, pair % kv_heads
    first, last = segment(tl.load(num_pages + row), tl.program_id(1), SPLITS, LEAST)
    if first >= last:
        return
    q, low_q, patterns, q_unit = load_key_query(
        query, row_stride, head_stride, row, kv_head, scaling, PER_KV, M, D, DP, RP, PAGE, BITS, LANES
    )  # fmt: skip
    g = tl.arange(0, M)
    head_row = out + (pair.to(tl.int64) * PER_KV + g) * columns * PAGE
    parts: tl.constexpr = PAGE // T if LANES == 1 else 1  # of a page, one at a time
    for begin in range(first * parts, last * parts, LANES):
        page, offset = (begin + tl.arange(0, LANES)) // parts, begin % parts * T
        exists = page < last
        slot = tl.load(table + row.to(tl.int64) * columns + page, mask=exists, other=0)
        page_head = slot.to(tl.int64) * kv_heads + kv_head
        tiles = score_pages(
            q, low_q, patterns, q_unit, codes, lows, steps, page_head, exists, offset, D, DP, PAGE, BITS, T, LANES
        )  # fmt: skip
        for k in tl.static_range(PAGE // T // parts):
            token = page[:, None] * PAGE + offset + k * T + tl.arange(0, T)[None, :]
            mask = exists[:, None, None] & (g < PER_KV)[None, :, None]
            tl.store(head_row[None, :, None] + token[:, None, :], tiles[k], mask=mask)


@triton.jit(do_not_specialize=["columns"])
def _judge_kernel(
    query, row_stride, head_stride, codes, lows, steps, table, columns, num_pages, out, scaling, tokens, few,
    kv_heads, PER_KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, PAGE: tl.constexpr,
    LEVELS: tl.constexpr, IS_MASS: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Bounds of ``PAGES`` pages are read once; the query heads take turns."""
    pair = tl.program_id(0)
    row, kv_head = pair // kv_heads, pair % kv_heads
    page = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    exists = page < tl.load(num_pages + row)
    slot = tl.load(table + row.to(tl.int64) * columns + page, mask=exists, other=0)
    page_head = slot.to(tl.int64) * kv_heads + kv_head
    bounds = (_page_bounds(codes, lows, steps, page_head, exists, 0, D, DP, PAGE, LEVELS),)
    if RP > 0:
        bounds = bounds + (_page_bounds(codes, lows, steps, page_head, exists, DP, D, RP, PAGE, LEVELS),)
    for g in range(PER_KV):
        place = query + row.to(tl.int64) * row_stride + (kv_head * PER_KV + g) * head_stride
        score = tl.zeros([PAGES], tl.float32)
        variance = tl.zeros([PAGES], tl.float32)
        for k in tl.static_range(len(bounds)):
            low, high = bounds[k]
            d = k * DP + tl.arange(0, low.shape[1])
            q = (tl.load(place + d, mask=d < D, other=0.0).to(tl.float32) * scaling)[None, :]
            if IS_MASS:
                spread = q * ((high - low) * 0.25)
                variance += tl.sum(spread * spread, 1)
                score += tl.sum(q * ((low + high) * 0.5), 1)
            else:
                score += tl.sum(tl.maximum(q * low, q * high), 1)
        if IS_MASS:
            deviation = tl.sqrt(variance)
            score += tl.where(deviation < few, tokens + variance * 0.5, deviation * few)
        score = tl.where(exists, score, float("-inf"))
        row_of = out + (pair.to(tl.int64) * PER_KV + g) * columns
        tl.store(row_of + page, score, mask=page < columns)


@triton.jit
def _page_bounds(
    codes, lows, steps, page_head, exists, FIRST: tl.constexpr, D: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """Least and largest key of channels from ``FIRST`` on of pages, ``[PAGES, C]`` each."""
    d = FIRST + tl.arange(0, C)
    mask = exists[:, None] & (d < D)[None, :]
    channel = page_head[:, None] * D + d[None, :]
    if LEVELS == 0:
        low = tl.full([page_head.shape[0], C], float("inf"), tl.float32)
        high = tl.full([page_head.shape[0], C], float("-inf"), tl.float32)
        for t in range(PAGE):
            keys = tl.load(codes + channel * PAGE + t, mask=mask, other=0.0).to(tl.float32)
            low = tl.minimum(low, keys)
            high = tl.maximum(high, keys)
        return low, high
    else:
        low = tl.load(lows + channel, mask=mask, other=0.0).to(tl.float32)
        return low, low + tl.load(steps + channel, mask=mask, other=0.0).to(tl.float32) * LEVELS
