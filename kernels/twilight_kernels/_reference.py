"""The definition of every kernel: pure torch, float32 or wider, any device, no speed tricks.

Each public kernel has a function of the same name and signature here, or in the modules that this one gathers; a
test asserts the pairing. What arguments are and what is returned stands with the public one.
Letters: B requests, H query heads, K KV heads, D head dim, P pages, N candidate pages, S key tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._reference_codec import largest_magnitudes as largest_magnitudes
from ._reference_codec import load_key_pages as load_key_pages
from ._reference_codec import load_value_pages as load_value_pages
from ._reference_codec import repeat_channels, wide_dtype
from ._reference_codec import store_key_pages as store_key_pages
from ._reference_codec import store_tokens as store_tokens
from ._reference_codec import store_value_pages as store_value_pages
from ._reference_codec import widest_channels as widest_channels
from ._reference_codec import write_rests as write_rests
from ._reference_prefill import attend_stripes as attend_stripes
from ._reference_prefill import select_stripes as select_stripes
from ._reference_score import channel_logits as channel_logits
from ._reference_score import key_logits as key_logits
from ._reference_score import page_masses as page_masses
from ._reference_score import page_scores as page_scores
from .layout import COLUMN_MULTIPLE, DecodeCall, KeyPages, PlainTokens, ValuePages


def top_p_threshold(logits: Tensor, p: float, *, forced_lse: Tensor | None = None, min_keep: int = 0) -> Tensor:
    """See ``top_p.top_p_threshold``; here by sorting, in float64."""
    x = logits.double()
    rows = x.shape[0]
    result = torch.full((rows,), -math.inf, dtype=torch.float32, device=x.device)
    if p >= 1.0:
        return result
    for row in range(rows):
        s = x[row][x[row] > -math.inf]
        if s.numel() == 0:
            continue
        mass = torch.logsumexp(s, 0)
        forced = forced_lse[row].double() if forced_lse is not None else torch.full_like(mass, -math.inf)
        need = p * (torch.logaddexp(mass, forced) - mass).exp() - (forced - mass).exp()
        order = s.sort(descending=True).values
        cumulative = (order - mass).exp().cumsum(0)
        count = 0 if need <= 0 else int((cumulative < need * (1 - 1e-12)).sum()) + 1
        count = min(max(count, min_keep), s.numel())
        result[row] = math.inf if count == 0 else order[count - 1].float()
    return result


def top_p_flags(logits: Tensor, p: float, *, forced_lse: Tensor) -> tuple[Tensor, Tensor]:
    """See ``top_p.top_p_flags``."""
    limit = top_p_threshold(logits.flatten(0, 2), p, forced_lse=forced_lse.flatten()).view(forced_lse.shape)
    flags = ((logits >= limit[..., None]) & (logits > -math.inf)).any(2)
    kept = logits.masked_fill(~flags.unsqueeze(2), -math.inf).logsumexp(-1).logaddexp(forced_lse)
    return flags, (kept - logits.logsumexp(-1).logaddexp(forced_lse)).exp()


def decode_attention(
    query: Tensor,
    key_pages: KeyPages,
    value_pages: ValuePages,
    plain: PlainTokens,
    *,
    block_table: Tensor,
    num_pages: Tensor,
    plain_len: Tensor,
    scaling: float,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    p: float = 1.0,
    min_keep: int = 0,
    min_sparse_len: int = 0,
    candidates: Tensor | None = None,
    candidate_tokens: Tensor | None = None,
    stats: Tensor | None = None,
    plain_table: Tensor | None = None,
    num_sinks: int = 0,
    strips: Tensor | None = None,
    refined: Tensor | None = None,
) -> Tensor:
    """See ``decode.decode_attention``."""
    if refined is not None:
        query = repeat_channels(query, refined)
        new_key = None if new_key is None else F.pad(new_key, (0, refined.shape[2]))
    rows, heads, _ = query.shape
    kv_heads, page_size = plain.keys.shape[1], key_pages.codec.page_size
    if new_key is not None and new_value is not None:
        row = torch.arange(rows, device=query.device)
        plain.keys[row, :, :, plain_len.long() - 1] = new_key
        plain.values[row, :, plain_len.long() - 1] = new_value
    out = torch.empty(rows, heads, plain.values.shape[-1], dtype=query.dtype, device=query.device)
    per_kv = heads // kv_heads
    wide = wide_dtype(query.dtype)
    for b in range(rows):
        count, columns = int(num_pages[b]), int(plain_len[b])
        row_plain = plain if plain_table is None else _plain_row(plain, plain_table[b], columns, num_sinks)
        place = b if plain_table is None else 0
        sparse = count * page_size >= min_sparse_len
        for k in range(kv_heads):
            logical = torch.arange(count, device=query.device)
            chosen: slice | Tensor = slice(None)
            if candidates is not None and sparse:
                logical = candidates[b, k][candidates[b, k] >= 0].long()
                if candidate_tokens is not None:
                    listed = candidate_tokens[b, k].unflatten(0, (-1, page_size))[: len(logical)]
                    logical, listed = logical[listed.any(-1)], listed[listed.any(-1)]
                    chosen = listed.flatten().nonzero()[:, 0]
            slots = block_table[b].long()[logical]
            keys = load_key_pages(key_pages, slots, wide)[:, k].flatten(0, 1)[chosen]  # [S, D]
            values = load_value_pages(value_pages, slots, wide)[:, k].flatten(0, 1)[chosen]
            q = query[b, k * per_kv : (k + 1) * per_kv].to(wide)  # [G, D]
            packed = q @ keys.T * scaling  # [G, S]
            forced = q @ row_plain.keys[place, k, :, :columns].to(wide) * scaling  # [G, columns]
            forced_lse = torch.logsumexp(forced, -1)
            share = p if sparse else 1.0
            limit = top_p_threshold(packed.float(), share, forced_lse=forced_lse.float(), min_keep=min_keep)
            own = packed.float() >= limit[:, None]
            kept = own.any(0)
            total = torch.logaddexp(torch.logsumexp(packed, -1), forced_lse) if packed.numel() else forced_lse
            logits = torch.cat([forced, packed[:, kept]], -1)
            value = torch.cat([row_plain.values[place, k, :columns].to(wide), values[kept]])
            out[b, k * per_kv : (k + 1) * per_kv] = (logits.softmax(-1) @ value).to(query.dtype)
            if stats is not None:
                block = stats[b, k * per_kv : (k + 1) * per_kv]
                block[:, 0] += len(logical) * page_size
                block[:, 1] += own.sum(-1)
                block[:, 2] += kept.sum()
                block[:, 3] += (torch.logsumexp(logits, -1) - total).exp()
                block[:, 4] += packed.shape[-1]
    return out


def prepare_decode(
    key_pages: KeyPages,
    value_pages: ValuePages,
    plain: PlainTokens,
    *,
    heads: int,
    scaling: float,
    p: float = 1.0,
    min_keep: int = 0,
    min_sparse_len: int = 0,
    stats: Tensor | None = None,
    refined: Tensor | None = None,
) -> DecodeCall:
    """See ``decode.prepare_decode``."""
    return decode_call(
        decode_attention, (key_pages, value_pages, plain), scaling=scaling, p=p, min_keep=min_keep,
        min_sparse_len=min_sparse_len, stats=stats, refined=refined,
    )  # fmt: skip


def decode_call(attention: Callable[..., Tensor], pages: tuple[Any, ...], **options: Any) -> DecodeCall:
    """Return the step of ``prepare_decode`` where there is nothing to prepare: a call of ``attention``."""

    def step(
        query: Tensor, new_key: Tensor, new_value: Tensor, block_table: Tensor, num_pages: Tensor, plain_len: Tensor
    ) -> Tensor:
        return attention(
            query, *pages, block_table=block_table, num_pages=num_pages, plain_len=plain_len, new_key=new_key,
            new_value=new_value, **options,
        )  # fmt: skip

    return step


def prompt_attention(
    query: Tensor,
    key_pages: KeyPages,
    value_pages: ValuePages,
    plain: PlainTokens,
    *,
    block_table: Tensor,
    plain_table: Tensor,
    start: int,
    num_sinks: int,
    window: int,
    scaling: float,
    p: float = 1.0,
    min_keep: int = 0,
    min_sparse_len: int = 0,
    stats: Tensor | None = None,
) -> Tensor:
    """See ``prompt.prompt_attention``; here one decode step after the other."""
    size, device = key_pages.codec.page_size, query.device
    sink_pages = -(-num_sinks // size)
    out = query.new_empty(*query.shape[:2], plain.values.shape[-1])
    skipped = max(0, (start - num_sinks - window) // size)  # pages that the first row reads packed
    for row in range(len(query)):
        count = max(0, (start + row - num_sinks - window) // size)
        own = torch.cat([plain_table[:sink_pages], plain_table[sink_pages + count - skipped :]])
        out[row : row + 1] = decode_attention(
            query[row : row + 1], key_pages, value_pages, plain, block_table=block_table[None],
            num_pages=torch.tensor([count], dtype=torch.int32, device=device),
            plain_len=torch.tensor([start + row + 1 - count * size], dtype=torch.int32, device=device),
            scaling=scaling, p=p, min_keep=min_keep, min_sparse_len=min_sparse_len,
            stats=None if stats is None else stats[row : row + 1], plain_table=own[None], num_sinks=num_sinks,
        )  # fmt: skip
    return out


def _plain_row(pages: PlainTokens, slots: Tensor, count: int, num_sinks: int) -> PlainTokens:
    """Gather the plain tokens of one row out of pages."""
    size = pages.capacity
    sinks = torch.arange(min(count, num_sinks), device=slots.device)
    rest = torch.arange(max(0, count - num_sinks), device=slots.device) + -(-num_sinks // size) * size
    columns = torch.cat([sinks, rest])
    page, offset = slots.long()[columns // size], columns % size
    room = torch.zeros(-count % COLUMN_MULTIPLE, dtype=torch.long, device=slots.device)
    page, offset = torch.cat([page, room]), torch.cat([offset, room])
    keys, values = pages.keys[page, :, :, offset], pages.values[page, :, offset]  # [C, K, D]
    return PlainTokens(keys.permute(1, 2, 0)[None].contiguous(), values.transpose(0, 1)[None].contiguous())
