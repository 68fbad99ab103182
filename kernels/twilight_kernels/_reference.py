"""The definition of every kernel: pure torch, float32 or wider, any device, no speed tricks.

Each public kernel has a function of the same name and signature here; a test asserts the pairing.
Letters: B requests, H query heads, K KV heads, D head dim, P pages, N candidate pages, S key tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._reference_prefill import attend_stripes as attend_stripes
from ._reference_prefill import select_stripes as select_stripes
from .layout import COLUMN_MULTIPLE, KeyPages, PlainTokens, ValuePages, packed_size, planes

CHANNEL_CHUNK = 1024  # tokens for which ``channel_logits`` chooses channels


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes planar along the last axis.

    Args:
        codes: ``[..., n]`` uint8 below ``2 ** bits``, ``n`` a multiple of 8.
        bits: 2, 3, 4 or 8.
    Returns:
        ``[..., n * bits / 8]`` uint8: for each plane of ``w`` bits, byte ``j`` holds elements
        ``j + i * n * w / 8``.
    """
    parts, shift = [], 0
    for width in planes(bits):
        fields = 8 // width
        plane = (codes >> shift) & ((1 << width) - 1)
        split = plane.unflatten(-1, (fields, -1)).to(torch.int32)
        weight = torch.arange(fields, device=codes.device).mul_(width).view(-1, 1)
        parts.append((split << weight).sum(-2).to(torch.uint8))
        shift += width
    return torch.cat(parts, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo ``pack``: ``[..., n * bits / 8]`` uint8 to ``[..., n]`` uint8."""
    count = packed.shape[-1] * 8 // bits
    out = torch.zeros(*packed.shape[:-1], count, dtype=torch.uint8, device=packed.device)
    start, shift = 0, 0
    for width in planes(bits):
        size = packed_size(count, width)
        plane = packed[..., start : start + size]
        fields = [((plane >> (i * width)) & ((1 << width) - 1)) for i in range(8 // width)]
        out |= torch.cat(fields, -1) << shift
        start, shift = start + size, shift + width
    return out


def store_key_pages(pages: KeyPages, page_ids: Tensor, keys: Tensor) -> None:
    """Quantize whole pages of keys into the slots ``page_ids``.

    Args:
        pages: the layer's key pages; slots ``page_ids`` are overwritten, all others untouched.
        page_ids: ``[N]`` int32, distinct, below ``pages.num_pages``.
        keys: ``[N, K, page_size, D]`` model dtype, any strides.
    Raises:
        ValueError: a key is not finite, or too large for float16 scales; nothing is written then.
    Source: KIVI, arXiv 2402.02750, section 3.1, with the range clipped about its midpoint.
    """
    codec, index = pages.codec, page_ids.long()
    _require_finite(keys, "keys")
    if codec.is_raw:
        pages.codes[index] = keys.transpose(-1, -2).to(pages.codes.dtype)
        return
    x = keys.float()  # [N, K, page_size, D]
    low, high = x.amin(-2), x.amax(-2)
    mid, half = (high + low) / 2, (high - low) / 2 * codec.clip
    lo = (mid - half).half()
    step = (half * 2 / codec.levels).half()
    _require_finite(lo, "keys")
    _require_finite(step, "keys")
    codes = _codes(x, lo.float().unsqueeze(-2), step.float().unsqueeze(-2), codec.levels)
    pages.codes[index] = pack(codes.transpose(-1, -2), codec.bits)
    pages.lo[index], pages.step[index] = lo, step


def load_key_pages(pages: KeyPages, page_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize the slots ``page_ids`` ([N] int32) to ``[N, K, page_size, D]`` of ``dtype``."""
    index = page_ids.long()
    if pages.codec.is_raw:
        return pages.codes[index].transpose(-1, -2).to(dtype)
    wide = _wide(dtype)
    codes = unpack(pages.codes[index], pages.codec.bits).to(wide)  # [N, K, D, page_size]
    x = pages.lo[index].to(wide).unsqueeze(-1) + codes * pages.step[index].to(wide).unsqueeze(-1)
    return x.transpose(-1, -2).to(dtype)


def store_value_pages(pages: ValuePages, page_ids: Tensor, values: Tensor) -> None:
    """Quantize whole pages of values into the slots ``page_ids``.

    Args:
        pages: the layer's value pages; slots ``page_ids`` are overwritten, all others untouched.
        page_ids: ``[N]`` int32, distinct, below ``pages.num_pages``.
        values: ``[N, K, page_size, D]`` model dtype, any strides.
    Raises:
        ValueError: a value is not finite, or too large for float16 scales; nothing is written then.
    Source: SKVQ, arXiv 2405.06219, section 3.1 (per token, groups of channels).
    """
    codec, index = pages.codec, page_ids.long()
    _require_finite(values, "values")
    if codec.is_raw:
        pages.codes[index] = values.to(pages.codes.dtype)
        return
    x = values.float()  # [N, K, page_size, D]
    parts = x.split(codec.group_size, -1)
    lo = torch.stack([part.amin(-1) for part in parts], -1)
    step = (torch.stack([part.amax(-1) for part in parts], -1) - lo) / codec.levels
    lo, step = lo.half(), step.half()
    _require_finite(lo, "values")
    _require_finite(step, "values")
    widths = torch.tensor([part.shape[-1] for part in parts], device=x.device)
    wide_lo, wide_step = (t.float().repeat_interleave(widths, -1) for t in (lo, step))
    pages.codes[index] = pack(_codes(x, wide_lo, wide_step, codec.levels), codec.bits)
    pages.lo[index], pages.step[index] = lo, step


def load_value_pages(pages: ValuePages, page_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize the slots ``page_ids`` ([N] int32) to ``[N, K, page_size, D]`` of ``dtype``."""
    index = page_ids.long()
    if pages.codec.is_raw:
        return pages.codes[index].to(dtype)
    wide = _wide(dtype)
    codes = unpack(pages.codes[index], pages.codec.bits).to(wide)  # [N, K, page_size, D]
    channel = torch.arange(codes.shape[-1], device=codes.device) // pages.codec.group_size
    return (pages.lo[index].to(wide)[..., channel] + codes * pages.step[index].to(wide)[..., channel]).to(dtype)


def page_scores(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float) -> Tensor:
    """Bound from above the logits that each page can hold.

    Args:
        query: ``[B, H, D]`` model dtype.
        pages: the layer's key pages.
        block_table: ``[B, P]`` int32, logical page to slot.
        num_pages: ``[B]`` int32, pages of each row.
        scaling: factor of the logits, the module's ``scaling``.
    Returns:
        ``[B, H, P]`` float32, at least the largest logit of the page's dequantized keys; ``-inf`` where no
        page is.
    Source: Quest, arXiv 2406.10774, section 3.2, algorithm 1; the bounds are ``(lo, lo + levels * step)``.
    """
    low, high = _bounds(pages, block_table, _wide(query.dtype))  # [B, P, K, D]
    q = _per_kv_head(query, low.shape[2]) * scaling  # [B, K, G, D]
    bound = torch.maximum(torch.einsum("bkgd,bpkd->bkgpd", q, low), torch.einsum("bkgd,bpkd->bkgpd", q, high)).sum(-1)
    return _without_absent(bound.flatten(1, 2), num_pages)


def page_masses(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float) -> Tensor:
    """Estimate the attention mass of each page from its bounds.

    Args:
        query: ``[B, H, D]`` model dtype.
        pages: the layer's key pages.
        block_table: ``[B, P]`` int32, logical page to slot.
        num_pages: ``[B]`` int32, pages of each row.
        scaling: factor of the logits.
    Returns:
        ``[B, H, P]`` float32, log of the estimated sum of ``exp(logit)`` over the page's tokens; ``-inf`` where no
        page is.
    Source: the free energy of independent normal logits (Derrida, Phys. Rev. B 24, 1981): of mean ``q . middle`` and
    deviation ``s = norm(q * range) / 4``, n of them have the log mass ``ln n + s ** 2 / 2`` above the mean, but from
    ``s = sqrt(2 ln n)`` on, where the largest alone counts, ``s * sqrt(2 ln n)``.
    """
    low, high = _bounds(pages, block_table, _wide(query.dtype))  # [B, P, K, D]
    q = _per_kv_head(query, low.shape[2]) * scaling  # [B, K, G, D]
    mean = torch.einsum("bkgd,bpkd->bkgp", q, (low + high) / 2)
    spread = torch.einsum("bkgd,bpkd->bkgp", q.square(), ((high - low) / 4).square()).sqrt()
    tokens = math.log(pages.codec.page_size)
    few = math.sqrt(2 * tokens)
    excess = torch.where(spread < few, tokens + spread.square() / 2, spread * few)
    return _without_absent((mean + excess).flatten(1, 2), num_pages)


def channel_logits(
    query: Tensor, pages: KeyPages, num_channels: int, block_table: Tensor, num_pages: Tensor, scaling: float
) -> Tensor:
    """Approximate the logits of all packed keys from a few of their channels.

    In each run of 1,024 tokens, the ``num_channels`` channels of the largest ``max |q| * range`` (maximum over the
    query heads of a KV head, range summed over the pages) are read; every other counts as the middle of its range.

    Args:
        query: ``[B, H, D]`` model dtype.
        pages: the layer's key pages.
        num_channels: channels to read, ``1 .. D``.
        block_table: ``[B, P]`` int32, logical page to slot.
        num_pages: ``[B]`` int32, pages of each row.
        scaling: factor of the logits.
    Returns:
        ``[B, H, P * page_size]`` float32, ``-inf`` past the last page of a row.
    Source: Double Sparsity, arXiv 2408.07092, section 3.1 (scores from heavy channels); SparQ, arXiv 2312.04985,
    section 4 (channels chosen by the query).
    """
    size, wide = pages.codec.page_size, _wide(query.dtype)
    rows, count = block_table.shape
    low, high = _bounds(pages, block_table, wide)
    keys = load_key_pages(pages, block_table.clamp_min(0).flatten(), wide).unflatten(0, (rows, count))
    q = _per_kv_head(query, low.shape[2]) * scaling  # [B, K, G, D]
    out = torch.zeros(rows, query.shape[1], count * size, dtype=wide, device=query.device)
    chunk = CHANNEL_CHUNK // size
    for b in range(rows):
        for first in range(0, int(num_pages[b]), chunk):
            part = slice(first, min(first + chunk, int(num_pages[b])))
            spread = (high - low)[b, part].sum(0)  # [K, D]
            heavy = (q[b].abs().amax(1) * spread).topk(num_channels, -1).indices
            is_heavy = torch.zeros_like(spread, dtype=torch.bool).scatter_(-1, heavy, True)
            middle = ((low + high) / 2)[b, part].unsqueeze(2)  # [P, K, 1, D]
            seen = torch.where(is_heavy[:, None], keys[b, part], middle)  # [P, K, page_size, D]
            logits = torch.einsum("kgd,pktd->kgpt", q[b], seen)
            out[b, :, part.start * size : part.stop * size] = logits.flatten(2).flatten(0, 1)
    lens = (num_pages * size).view(-1, 1)
    absent = torch.arange(out.shape[-1], device=out.device) >= lens
    return out.masked_fill(absent[:, None], -math.inf)


def key_logits(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float) -> Tensor:
    """Compute the logits of all packed keys.

    Args:
        query: ``[B, H, D]`` model dtype.
        pages: the layer's key pages.
        block_table: ``[B, P]`` int32, logical page to slot.
        num_pages: ``[B]`` int32, pages of each row.
        scaling: factor of the logits.
    Returns:
        ``[B, H, P * page_size]`` float32, ``-inf`` past the last page of a row.
    Source: ``q . (lo + code * step) = sum((q * step) * code) + q . lo``, so the codes are never dequantized.
    """
    rows, count = block_table.shape
    keys = load_key_pages(pages, block_table.clamp_min(0).flatten(), _wide(query.dtype))
    keys = keys.unflatten(0, (rows, count)).transpose(1, 2).flatten(2, 3)  # [B, K, S, D]
    q = _per_kv_head(query, keys.shape[1])
    logits = (torch.einsum("bkgd,bksd->bkgs", q, keys) * scaling).flatten(1, 2)
    lens = (num_pages * pages.codec.page_size).view(-1, 1)
    absent = torch.arange(logits.shape[-1], device=logits.device) >= lens
    return logits.masked_fill(absent[:, None], -math.inf)


def top_p_threshold(logits: Tensor, p: float, *, forced_lse: Tensor | None = None, min_keep: int = 0) -> Tensor:
    """Find, for each row, the logit from which kept tokens carry a share ``p`` of the mass.

    Args:
        logits: ``[R, S]`` float32; ``-inf`` marks entries that do not exist.
        p: mass to keep, in ``(0, 1]``; 1.0 keeps everything.
        forced_lse: ``[R]`` float32, log-sum-exp of tokens that are kept in any case (sinks, window) and count
            as mass; None means none.
        min_keep: entries to keep at least, as far as they exist.
    Returns:
        ``[R]`` float32 ``t``: keep ``logits >= t``. The kept mass is at least ``p`` of the whole, ties are
        kept together; ``-inf`` if everything is kept, ``+inf`` if the forced tokens suffice.
    Source: Twilight, arXiv 2502.02770, section 4.2, as bisection on logits from the provable start
        ``max - ln(n / (1 - need))``, where ``need`` is the share of the candidates' mass that must be kept.
    """
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
    """Flag what some query head of a KV head needs to carry a share ``p`` of its mass.

    Args:
        logits: ``[B, K, G, N]`` float32, log masses; ``-inf`` marks entries that do not exist.
        p: mass to keep, in ``(0, 1]``; 1.0 keeps everything.
        forced_lse: ``[B, K, G]`` float32, log-sum-exp of what is kept in any case and counts as mass.
    Returns:
        ``[B, K, N]`` bool, the union over G of the entries at or above ``top_p_threshold``; ``[B, K, G]`` float32, the
        share of each query head's mass that flagged entries and forced mass carry.
    Source: Twilight, arXiv 2502.02770, section 4.2 (union over the heads of a group).
    """
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
) -> Tensor:
    """Attend one query token a row to its plain tokens and to the packed tokens that carry the mass.

    The key pages are scored once; each query head keeps the fewest packed tokens that, with the plain tokens,
    carry ``p`` of the attention mass; the heads on one KV head attend to the union, renormalised over it.

    Args:
        query: ``[B, H, D]`` model dtype.
        key_pages, value_pages: the layer's pages.
        plain: sinks and window; with ``new_key`` given, column ``plain_len - 1`` of each row is written
            first.
        block_table: ``[B, P]`` int32, logical page to slot.
        num_pages: ``[B]`` int32, pages of each row.
        plain_len: ``[B]`` int32, valid columns of ``plain`` (new token included), at least 1.
        scaling: factor of the logits.
        new_key, new_value: ``[B, K, Dk]``, ``[B, K, Dv]`` model dtype, the step's token.
        p: mass to keep, in ``(0, 1]``; 1.0 attends to every candidate.
        min_keep: packed tokens each head keeps at least.
        min_sparse_len: rows with fewer packed tokens than this keep them all.
        candidates: ``[B, K, N]`` int32 logical pages to score, -1 padded, ascending; None scores every page.
            Rows below ``min_sparse_len`` ignore it.
        candidate_tokens: ``[B, K, N * page_size]`` bool, which tokens of those pages are candidates, needs
            ``candidates``; None means all of them.
        stats: ``[B, H, 5]`` float64, added to: packed tokens scored, whole pages; packed tokens the head itself
            needs; packed tokens attended, the union over the query heads of its KV head; share of the
            candidates' and plain tokens' mass attended; packed tokens that are candidates.
        plain_table: ``[B, C]`` int32; given, ``plain`` is no row each but pages of ``page_size`` columns, and
            row b's plain tokens are the first ``num_sinks`` of its first ``ceil(num_sinks / page_size)`` pages,
            then those of the next pages.
        num_sinks: plain tokens in those first pages.
    Returns:
        ``[B, H, Dv]`` in the query's dtype.
    Source: Twilight, arXiv 2502.02770, section 4 (select, then prune); union over query heads, section 4.2.
    """
    rows, heads, _ = query.shape
    kv_heads, page_size = plain.keys.shape[1], key_pages.codec.page_size
    if new_key is not None and new_value is not None:
        row = torch.arange(rows, device=query.device)
        plain.keys[row, :, :, plain_len.long() - 1] = new_key
        plain.values[row, :, plain_len.long() - 1] = new_value
    out = torch.empty(rows, heads, plain.values.shape[-1], dtype=query.dtype, device=query.device)
    per_kv = heads // kv_heads
    wide = _wide(query.dtype)
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


def _bounds(pages: KeyPages, block_table: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Least and largest key of each channel of each page, ``[B, P, K, D]``."""
    slots = block_table.clamp_min(0).long()
    if pages.codec.is_raw:
        low, high = pages.codes[slots].to(wide).aminmax(dim=-1)
        return low, high
    low = pages.lo[slots].to(wide)
    return low, low + pages.codec.levels * pages.step[slots].to(wide)


def _without_absent(scores: Tensor, num_pages: Tensor) -> Tensor:
    """Put ``-inf`` where a row has no page."""
    absent = torch.arange(scores.shape[-1], device=scores.device) >= num_pages.view(-1, 1)
    return scores.masked_fill(absent[:, None], -math.inf)


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


def _codes(x: Tensor, lo: Tensor, step: Tensor, levels: int) -> Tensor:
    """Round to the nearest level of the *stored* scales, so that codes and float16 rounding agree."""
    inverse = torch.where(step > 0, 1.0 / step, torch.zeros_like(step))
    return ((x - lo) * inverse + 0.5).floor().clamp(0, levels).to(torch.uint8)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or float64 where the caller asks for that."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_kv_head(query: Tensor, kv_heads: int) -> Tensor:
    """``[B, H, D]`` to float32 or wider ``[B, K, H / K, D]``."""
    wide: Tensor = query.to(_wide(query.dtype)).unflatten(1, (kv_heads, -1))
    return wide


def _require_finite(x: Tensor, what: str) -> None:
    if not bool(torch.isfinite(x).all()):
        raise not_finite(what)


def not_finite(what: str) -> ValueError:
    """Return the error of every backend for numbers that cannot be stored."""
    return ValueError(
        f"{what} must be finite and within float16 range to be packed, got NaN, infinity or a larger number; "
        "check the model's dtype for overflow, or use the preset 'exact'"
    )
