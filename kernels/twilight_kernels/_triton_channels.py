"""Logits from a few channels on GPUs (definition: ``_reference.channel_logits``).

A block of threads takes 1,024 tokens of one KV head: it adds up the ranges of their pages, chooses the channels in
which they differ most for its queries, and scores the pages from the codes of those channels alone.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._reference_score import CHANNEL_CHUNK
from ._triton_key_words import column_logits, load_patterns, query_columns
from ._triton_keys import score_launch, score_shape, token_logits
from ._triton_tiles import QUERY, last_contiguous, load_query, power_of_two
from .layout import KeyPages


def channel_logits(
    query: Tensor, pages: KeyPages, num_channels: int, block_table: Tensor, num_pages: Tensor, scaling: float
) -> Tensor:
    """See ``_reference.channel_logits``."""
    _, kv_heads, dim, page_size = pages.form
    rows, heads, _ = query.shape
    columns = block_table.shape[1]
    out = torch.full((rows, heads, columns * page_size), -math.inf, device=query.device)
    if not out.numel():
        return out
    query, table = last_contiguous(query), block_table.contiguous()
    shape = channel_shape(heads // kv_heads, dim, page_size, num_channels, pages.codec.bits)
    chunks = triton.cdiv(columns, shape["PAGES"])
    with torch.cuda.device_of(query):
        channels_kernel[(rows * kv_heads, chunks)](
            query, *query.stride()[:2], pages.codes, pages.lo, pages.step, table, columns, num_pages.contiguous(),
            out, scaling, kv_heads, **shape,
            **score_launch(shape),
        )  # fmt: skip
    return out


def channel_shape(per_kv: int, dim: int, page_size: int, num_channels: int, bits: int) -> dict[str, int]:
    """Constants of ``channels_kernel``."""
    shape = score_shape(page_size, dim, bits, per_kv)
    del shape["RP"]  # the few that are chosen are one part
    return {
        **shape, "DP": max(16, power_of_two(dim)), "CHANNELS": num_channels, "CP": max(16, power_of_two(num_channels)),
        "PAGES": CHANNEL_CHUNK // page_size,
    }  # fmt: skip


@triton.jit(do_not_specialize=["columns"])
def channels_kernel(
    query, row_stride, head_stride, codes, lows, steps, table, columns, num_pages, out, scaling, kv_heads,
    PER_KV: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHANNELS: tl.constexpr,
    CP: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Choose ``CHANNELS`` channels for ``PAGES`` pages, and score these; all others count as their middle."""
    pair = tl.program_id(0)
    row, kv_head = pair // kv_heads, pair % kv_heads
    first = tl.program_id(1) * PAGES
    last = tl.minimum(first + PAGES, tl.load(num_pages + row))
    if first >= last:
        return
    table += row.to(tl.int64) * columns
    lane, d, n, g = tl.arange(0, LANES), tl.arange(0, DP), tl.arange(0, CP), tl.arange(0, M)
    q, q_unit = load_query(query, row_stride, head_stride, row, kv_head, scaling, PER_KV, M, D, DP, 0, BITS == 16)
    wide = q[0].to(tl.float32)
    spread = tl.zeros([LANES, DP], tl.float32)
    for begin in range(first, last, LANES):
        page_head, exists = _page_heads(table, begin + lane, last, kv_heads, kv_head)
        spread += _low_and_spread(codes, lows, steps, page_head, exists, D, DP, PAGE, BITS, T, LANES)[1]
    heaviness = tl.max(tl.abs(wide * q_unit[:, None]), 0) * tl.sum(spread, 0)
    # of equal ones the first; floats that are not negative are in the order of their bits
    order = heaviness.to(tl.int32, bitcast=True).to(tl.int64) * DP + (DP - 1 - d)
    best = tl.topk(tl.where(d < D, order, -1), CP)
    is_chosen = n < CHANNELS
    chosen = tl.where(is_chosen, DP - 1 - best % DP, 0).to(tl.int32)
    is_heavy = order >= tl.min(tl.where(is_chosen, best, best + (1 << 62)), 0)
    heads = row.to(tl.int64) * row_stride + (kv_head * PER_KV + g) * head_stride
    is_few = (g < PER_KV)[:, None] & is_chosen[None, :]
    few = tl.load(query + heads[:, None] + chosen[None, :], mask=is_few, other=0.0)
    if BITS != 16:  # by exact powers of two
        few = few.to(tl.float32) * (scaling / q_unit)[:, None] * QUERY
    if LANES > 1:
        patterns = load_patterns(query, BITS, PAGE)
        few = query_columns(few, patterns[0], query.dtype.element_ty == tl.float32)
    head_row = out + (pair.to(tl.int64) * PER_KV + g) * columns * PAGE
    parts: tl.constexpr = PAGE // T if LANES == 1 else 1  # of a page, one at a time
    for begin in range(first * parts, last * parts, LANES):
        page, offset = (begin + lane) // parts, begin % parts * T
        page_head, exists = _page_heads(table, page, last, kv_heads, kv_head)
        low, spread = _low_and_spread(codes, lows, steps, page_head, exists, D, DP, PAGE, BITS, T, LANES)
        channel = page_head[:, None] * D + chosen[None, :]
        mask = exists[:, None] & is_chosen[None, :]
        steps_of, places = (), ((channel, mask),)
        if BITS == 16:
            known = tl.where(is_heavy[None, :], 0.0, low + spread * 0.5)
        else:
            steps_of = (tl.load(steps + channel, mask=mask, other=0.0),)
            known = low + tl.where(is_heavy[None, :], 0.0, spread * (0.5 * ((1 << BITS) - 1)))
        bias = tl.sum(wide[None, :, :] * known[:, None, :], 2)
        if BITS != 16:
            bias *= 1 / QUERY
        if LANES == 1:
            tiles = token_logits(codes, places, offset, (few,), steps_of, bias, q_unit, exists, PAGE, BITS, T)
        else:
            tiles = column_logits(codes, places, (few,), patterns, steps_of, bias, q_unit, exists, PAGE, BITS, T, LANES)
        for k in tl.static_range(PAGE // T // parts):
            token = page[:, None] * PAGE + offset + k * T + tl.arange(0, T)[None, :]
            is_head = exists[:, None, None] & (g < PER_KV)[None, :, None]
            tl.store(head_row[None, :, None] + token[:, None, :], tiles[k], mask=is_head)


@triton.jit
def _page_heads(table, page, last, kv_heads, kv_head):
    """Where pages ``[L]`` of a KV head are, and which of them are there."""
    exists = page < last
    return tl.load(table + page, mask=exists, other=0).to(tl.int64) * kv_heads + kv_head, exists


@triton.jit
def _low_and_spread(
    codes, lows, steps, page_head, exists, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr,
    T: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Least key of each channel of pages ``[L, DP]``, and its range, in steps where keys are packed."""
    d = tl.arange(0, DP)
    channel = page_head[:, None] * D + d[None, :]
    mask = exists[:, None] & (d < D)[None, :]
    if BITS == 16:
        low = tl.full([LANES, DP], float("inf"), tl.float32)
        high = tl.full([LANES, DP], float("-inf"), tl.float32)
        for tile in tl.static_range(PAGE // T):
            t = tile * T + tl.arange(0, T)
            place = codes + channel[:, :, None] * PAGE + t[None, None, :]
            keys = tl.load(place, mask=mask[:, :, None], other=0.0).to(tl.float32)
            low = tl.minimum(low, tl.min(keys, 2))
            high = tl.maximum(high, tl.max(keys, 2))
        return low, high - low
    else:
        low = tl.load(lows + channel, mask=mask, other=0.0).to(tl.float32)
        return low, tl.load(steps + channel, mask=mask, other=0.0).to(tl.float32)
