"""The definition of scoring packed keys: pure torch, float32 or wider.

B requests, H query heads, K KV heads, G of the first on one of the second, D head dim, P pages.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._reference_codec import load_key_pages, wide_dtype
from .layout import KeyPages

CHANNEL_CHUNK = 1024  # tokens for which ``channel_logits`` chooses channels


def page_scores(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float) -> Tensor:
    """See ``score.page_scores``; the bounds of a channel are ``(lo, lo + levels * step)``."""
    low, high = _bounds(pages, block_table, wide_dtype(query.dtype))  # [B, P, K, D]
    q = _per_kv_head(query, low.shape[2]) * scaling  # [B, K, G, D]
    bound = torch.maximum(torch.einsum("bkgd,bpkd->bkgpd", q, low), torch.einsum("bkgd,bpkd->bkgpd", q, high)).sum(-1)
    return _without_absent(bound.flatten(1, 2), num_pages)


def page_masses(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float) -> Tensor:
    """See ``score.page_masses``.

    Source: the free energy of independent normal logits (Derrida, Phys. Rev. B 24, 1981): of mean ``q . middle`` and
    deviation ``s = norm(q * range) / 4``, n of them have the log mass ``ln n + s ** 2 / 2`` above the mean, but from
    ``s = sqrt(2 ln n)`` on, where the largest alone counts, ``s * sqrt(2 ln n)``.
    """
    low, high = _bounds(pages, block_table, wide_dtype(query.dtype))  # [B, P, K, D]
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
    """See ``score.channel_logits``.

    In each run of 1,024 tokens, the ``num_channels`` channels of the largest ``max |q| * range`` (maximum over the
    query heads of a KV head, range summed over the pages) are read; every other counts as the middle of its range.
    """
    size, wide = pages.codec.page_size, wide_dtype(query.dtype)
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
    """See ``score.key_logits``; kernels use ``q . (lo + code * step) = sum((q * step) * code) + q . lo``."""
    rows, count = block_table.shape
    keys = load_key_pages(pages, block_table.clamp_min(0).flatten(), wide_dtype(query.dtype))
    keys = keys.unflatten(0, (rows, count)).transpose(1, 2).flatten(2, 3)  # [B, K, S, D]
    q = _per_kv_head(query, keys.shape[1])
    logits = (torch.einsum("bkgd,bksd->bkgs", q, keys) * scaling).flatten(1, 2)
    lens = (num_pages * pages.codec.page_size).view(-1, 1)
    absent = torch.arange(logits.shape[-1], device=logits.device) >= lens
    return logits.masked_fill(absent[:, None], -math.inf)


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


def _per_kv_head(query: Tensor, kv_heads: int) -> Tensor:
    """``[B, H, D]`` to float32 or wider ``[B, K, H / K, D]``."""
    wide: Tensor = query.to(wide_dtype(query.dtype)).unflatten(1, (kv_heads, -1))
    return wide
