"""Decode attention over packed pages on GPUs: score, prune, attend, merge.

Definition: ``_reference.decode_attention``. A row's pages are cut into 64 splits (``_triton_tiles.segment``), by the
row's own length and nothing else, so that a row's bits depend neither on its neighbours nor on the width of the
block table. Launches of a step with ``p < 1``:

1. ``plain_kernel`` writes the step's token and attends to sinks and window;
2. ``logits_kernel`` reads the packed keys, the only time: codes times the folded query;
3. ``start_kernel``, ``collect_kernel``, ``limit_kernel`` (``_triton_prune``) find what each query head needs, the
   last alone where all rows are short;
4. ``kept_kernel`` lists the union over the query heads of a KV head, and attends to it;
5. ``merge_kernel`` merges all parts by log-sum-exp and adds up the counters.

Rows that are dense keep everything; at ``p = 1``, where all are, 3 is left out. Nothing here waits for the device:
sizes come from shapes, what depends on data is bounded by ``num_pages`` on the device, so a step can be captured in a
CUDA graph (the block table's width and the candidates' number are what it was captured for).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ._reference_codec import repeat_channels
from ._triton_attend import RUN, kept_kernel, plain_kernel
from ._triton_keys import logits_launch, score_shape
from ._triton_logits import logits_kernel
from ._triton_merge import LISTED_TILE, SLOT_TILE, merge_kernel
from ._triton_prune import QUADS, find_limits
from ._triton_tiles import (
    FUSED,
    LEAST_TOKENS,
    REGISTERS,
    SPLITS,
    channel_parts,
    grid_splits,
    last_contiguous,
    power_of_two,
    tile_tokens,
    warps_for,
)
from ._triton_values import value_launch, value_shape
from .layout import KeyPages, PlainTokens, ValuePages


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
    """See ``_reference.decode_attention``; ``strips`` say what may be shared, and each row reads for itself here."""
    if refined is not None:
        query = repeat_channels(query, refined)
        new_key = None if new_key is None else F.pad(new_key, (0, refined.shape[2]))
    query, num_pages = last_contiguous(query), num_pages.contiguous()
    block_table = block_table.contiguous()
    rows, heads, _ = query.shape
    value_dim = plain.form[3]
    out = torch.empty(rows, heads, value_dim, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    listed = None if candidates is None else candidates.shape[2]
    with torch.cuda.device_of(query):
        parts = _attend_plain(query, plain, plain_len, scaling, new_key, new_value, plain_table, num_sinks)
        counters = _attend_packed(
            query, key_pages, value_pages, block_table, num_pages, candidates, candidate_tokens, parts, scaling,
            min_sparse_len, p, min_keep,
        )  # fmt: skip
        slots, per_kv = parts[0].shape[1], parts[0].shape[2]
        merge_kernel[(rows * heads,)](
            *parts, out, num_pages, _or(candidates, num_pages), _flags(candidate_tokens, num_pages), listed or 0,
            *counters, _or(stats, out), min_sparse_len, heads, slots, slots - SPLITS, PER_KV=per_kv, DV=value_dim,
            VP=power_of_two(value_dim), PAGE=key_pages.codec.page_size, PRUNES=p < 1.0,
            HAS_PAGES=listed is not None, HAS_TOKENS=candidate_tokens is not None, HAS_STATS=stats is not None,
            SLOTS=power_of_two(slots), TILE=SLOT_TILE, LISTED=LISTED_TILE, **_splits(key_pages), num_warps=4, **FUSED,
        )  # fmt: skip
    return out


def _attend_plain(
    query: Tensor, plain: PlainTokens, plain_len: Tensor, scaling: float, new_key: Tensor | None,
    new_value: Tensor | None, plain_table: Tensor | None, num_sinks: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attend to sinks and window; return the parts, with room for those of the packed tokens."""
    _, kv_heads, _, value_dim = plain.form
    (rows, heads, _), capacity = query.shape, plain.capacity
    columns = 1 if plain_table is None else plain_table.shape[1]
    runs = triton.cdiv(columns * capacity, RUN)
    shape = rows * kv_heads, runs + SPLITS, heads // kv_heads
    parts = torch.empty(*shape, value_dim, device=query.device)
    tops, sums = (torch.empty(shape, device=query.device) for _ in range(2))
    table = plain_len if plain_table is None else plain_table.contiguous()
    appended: tuple[Any, ...] = (query, 0, 0, query, 0, 0)
    if new_key is not None and new_value is not None:
        new_key, new_value = last_contiguous(new_key), last_contiguous(new_value)
        appended = (new_key, *new_key.stride()[:2], new_value, *new_value.stride()[:2])
    plain_kernel[(rows * kv_heads, runs)](
        query, *query.stride()[:2], plain.keys, plain.values, plain_len.contiguous(), table, columns, num_sinks,
        triton.cdiv(num_sinks, capacity), *appended, parts, tops, sums, scaling, kv_heads, shape[1], capacity,
        **_heads(query, kv_heads, value_dim), HAS_NEW=new_key is not None, IS_PAGED=plain_table is not None, RUN=RUN,
        T=min(32, _tile(query, value_dim)), num_warps=_warps(query, value_dim), num_stages=2, maxnreg=REGISTERS,
        **FUSED,
    )  # fmt: skip
    return parts, tops, sums


def _attend_packed(
    query: Tensor, key_pages: KeyPages, value_pages: ValuePages, table: Tensor, num_pages: Tensor,
    candidates: Tensor | None, tokens: Tensor | None, parts: tuple[Tensor, Tensor, Tensor], scaling: float,
    min_sparse_len: int, p: float, min_keep: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Score, prune and attend; return tokens that each head needs, tokens kept a split, log of the whole mass."""
    _, kv_heads, key_dim, page_size = key_pages.form
    (rows, heads, _), device, columns = query.shape, query.device, table.shape[1]
    slots, per_kv = parts[0].shape[1], heads // kv_heads
    listed = None if candidates is None else candidates.shape[2]
    # rows below min_sparse_len attend to pages of their own, which may be more than are listed
    most = columns if listed is None else max(listed, min(columns, triton.cdiv(min_sparse_len, page_size)))
    width, pairs, splits = most * page_size, rows * kv_heads, _splits(key_pages)
    grid = pairs, grid_splits(most, splits["LEAST"])
    logits = torch.empty(rows * heads, width, device=device)
    tops, sums = (torch.empty(pairs, SPLITS, per_kv, device=device) for _ in range(2))
    pages, is_wide, runs = _or(candidates, num_pages), query.dtype == torch.float32, slots - SPLITS
    shape = score_shape(page_size, key_dim, key_pages.codec.bits, per_kv)
    logits_kernel[grid](
        query, *query.stride()[:2], key_pages.codes, key_pages.lo, key_pages.step, table, columns, num_pages, pages,
        _flags(tokens, num_pages), listed or 0, logits, tops, sums, width, scaling, min_sparse_len, kv_heads,
        **shape, HAS_PAGES=listed is not None, HAS_TOKENS=tokens is not None,
        **splits, **logits_launch(shape, tokens is not None, is_wide),
    )  # fmt: skip
    limits, needed, masses = sums, num_pages, sums  # read by nobody at p = 1
    if p < 1.0:
        limits, needed, masses = find_limits(
            logits, tops, sums, parts[1:], num_pages, p, min_keep, runs=runs, page_size=page_size, num_listed=listed,
            min_sparse_len=min_sparse_len, per_kv=per_kv,
        )  # fmt: skip
    is_all = p >= 1.0 and listed is None
    positions = num_pages if is_all else torch.empty(pairs, width, dtype=torch.int32, device=device)
    kept = torch.empty(pairs, SPLITS, dtype=torch.int32, device=device)
    codec = value_pages.codec
    shape = value_shape(value_pages.head_dim, codec.bits, codec.group_size, per_kv, is_wide)
    kept_kernel[grid](
        logits, tops, positions, limits, value_pages.codes, value_pages.lo, value_pages.step, table, columns, num_pages,
        pages, listed or 0, *parts, kept, width, min_sparse_len, kv_heads, slots, runs, PAGE=page_size,
        HAS_PAGES=listed is not None, PRUNES=p < 1.0, QUADS=QUADS, **shape, **splits,
        **value_launch(shape, is_wide),
    )  # fmt: skip
    return needed, kept, masses


def _heads(query: Tensor, kv_heads: int, value_dim: int) -> dict[str, int]:
    per_kv, dim = query.shape[1] // kv_heads, query.shape[2]
    return {
        "PER_KV": per_kv, "M": max(16, power_of_two(per_kv)), **channel_parts(dim), "DV": value_dim,
        "VP": max(16, power_of_two(value_dim)),
    }  # fmt: skip


def _tile(query: Tensor, value_dim: int) -> int:
    largest = max(channel_parts(query.shape[2])["DP"], value_dim)
    return tile_tokens(largest, query.dtype == torch.float32 or largest > 128)


def _warps(query: Tensor, *dims: int) -> int:
    return warps_for(query.dtype == torch.float32, channel_parts(query.shape[2])["DP"], *dims)


def _splits(pages: KeyPages) -> dict[str, int]:
    return {"SPLITS": SPLITS, "LEAST": max(1, LEAST_TOKENS // pages.codec.page_size)}


def _or(given: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is given for a tensor that it will not touch."""
    return other if given is None else given.contiguous()


def _flags(tokens: Tensor | None, other: Tensor) -> Tensor:
    return other if tokens is None else tokens.contiguous().view(torch.uint8)
