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

from ._triton_tiles import (
    LEAST_TOKENS,
    SPLITS,
    fold_page,
    grid_splits,
    last_contiguous,
    load_query,
    page_logits,
    power_of_two,
    segment,
    tile_tokens,
    warps_for,
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
    bits, tile, least = pages.codec.bits, min(page_size, tile_tokens(dim)), max(1, LEAST_TOKENS // page_size)
    with torch.cuda.device_of(query):
        _key_logits_kernel[(rows * kv_heads, grid_splits(columns, least))](
            query, *query.stride()[:2], pages.codes, pages.lo, pages.step, table, columns, num_pages.contiguous(),
            out, scaling, kv_heads, PER_KV=heads // kv_heads, M=max(16, power_of_two(heads // kv_heads)), D=dim,
            DP=max(16, power_of_two(dim)), PAGE=page_size, BITS=bits, T=tile, SPLITS=SPLITS,
            LEAST=least, num_stages=2,
            num_warps=warps_for(query.dtype == torch.float32, dim),
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
            out, scaling, tokens, math.sqrt(2 * tokens), kv_heads, PER_KV=heads // kv_heads, D=dim,
            DP=power_of_two(dim), PAGE=page_size, LEVELS=0 if pages.codec.is_raw else pages.codec.levels,
            IS_MASS=is_mass, PAGES=_PAGES, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


_PAGES = 16  # pages whose bounds are read at once


@triton.jit(do_not_specialize=["columns"])
def _key_logits_kernel(
    query, row_stride, head_stride, codes, lows, steps, table, columns, num_pages, out, scaling, kv_heads,
    PER_KV: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    BITS: tl.constexpr, T: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row, kv_head = pair // kv_heads, pair % kv_heads
    first, last = segment(tl.load(num_pages + row), tl.program_id(1), SPLITS, LEAST)
    if first >= last:
        return
    q, q_unit = load_query(query, row_stride, head_stride, row, kv_head, scaling, PER_KV, M, D, DP, BITS == 16)
    g = tl.arange(0, M)
    head_row = out + (pair.to(tl.int64) * PER_KV + g) * columns * PAGE
    tiles: tl.constexpr = PAGE // T
    for step in range(first * tiles, last * tiles):
        page = step // tiles
        t = step % tiles * T + tl.arange(0, T)
        slot = tl.load(table + row.to(tl.int64) * columns + page)
        page_head = slot.to(tl.int64) * kv_heads + kv_head
        high, rest, unit, bias = fold_page(q, lows, steps, page_head, row >= 0, M, D, DP, BITS == 16)
        logits = page_logits(codes, page_head, row >= 0, t, high, rest, unit, bias, q_unit, D, DP, PAGE, BITS)
        tl.store(head_row[:, None] + (page * PAGE + t)[None, :], logits, mask=(g < PER_KV)[:, None])


@triton.jit(do_not_specialize=["columns"])
def _judge_kernel(
    query, row_stride, head_stride, codes, lows, steps, table, columns, num_pages, out, scaling, tokens, few,
    kv_heads, PER_KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, LEVELS: tl.constexpr,
    IS_MASS: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Bounds of ``PAGES`` pages ``[PAGES, DP]`` are read once; the query heads take turns."""
    pair = tl.program_id(0)
    row, kv_head = pair // kv_heads, pair % kv_heads
    page = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    exists = page < tl.load(num_pages + row)
    slot = tl.load(table + row.to(tl.int64) * columns + page, mask=exists, other=0)
    d = tl.arange(0, DP)
    mask = exists[:, None] & (d < D)[None, :]
    channel = (slot.to(tl.int64) * kv_heads + kv_head)[:, None] * D + d[None, :]
    if LEVELS == 0:
        low = tl.full([PAGES, DP], float("inf"), tl.float32)
        high = tl.full([PAGES, DP], float("-inf"), tl.float32)
        for t in range(PAGE):
            keys = tl.load(codes + channel * PAGE + t, mask=mask, other=0.0).to(tl.float32)
            low = tl.minimum(low, keys)
            high = tl.maximum(high, keys)
    else:
        low = tl.load(lows + channel, mask=mask, other=0.0).to(tl.float32)
        high = low + tl.load(steps + channel, mask=mask, other=0.0).to(tl.float32) * LEVELS
    for g in range(PER_KV):
        head = kv_head * PER_KV + g
        place = query + row.to(tl.int64) * row_stride + head * head_stride + d
        q = (tl.load(place, mask=d < D, other=0.0).to(tl.float32) * scaling)[None, :]
        if IS_MASS:
            spread = q * ((high - low) * 0.25)
            deviation = tl.sqrt(tl.sum(spread * spread, 1))
            excess = tl.where(deviation < few, tokens + deviation * deviation * 0.5, deviation * few)
            score = tl.sum(q * ((low + high) * 0.5), 1) + excess
        else:
            score = tl.sum(tl.maximum(q * low, q * high), 1)
        score = tl.where(exists, score, float("-inf"))
        row_of = out + (pair.to(tl.int64) * PER_KV + g) * columns
        tl.store(row_of + page, score, mask=page < columns)
