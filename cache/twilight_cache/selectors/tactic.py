"""Tactic: clusters of keys in the order of their centroids, as many as reach a mass (arXiv 2502.12216, section 4).

Keys of each KV head are clustered by k-means, 16 tokens a cluster on average (the paper's experiments). A step scores
the centroids, and takes clusters by falling score until their estimated mass reaches a share; the query heads of a KV
head take the union.

Deviations. *Runs*: the paper clusters the whole prompt, attends to everything generated since, and clusters anew every
2,048 steps. Here the pages of a row are always cut, from the first, into runs of 1,024 tokens, then 256, then 64, and
each run is clustered by itself: full runs merge into a longer one as pages arrive. So every packed token is clustered,
at most four times in all, and the clusters depend on the packed tokens alone, not on how they were fed. *Tail*: the
paper fits ``a / x + b`` to exact weights of the first 2 % of tokens and of two samples. Exact logits of scattered
tokens cost more than those of whole pages in our layout, so a cluster's mass is taken as that of ``count`` tokens at
``q . centroid`` plus half the variance of the logits within it (``|q|^2`` times its mean spread a channel), which is
the mean of a log-normal. On the embedded model this reaches what it is asked for where the fit falls short of it, at
as many tokens. *Start*: every 16th key, not random ones, and five iterations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twilight_kernels import KeyPages, load_key_pages

from ..clusters import cluster_keys
from .budget import Budget, budget_tokens, coverage_of, every_page, likeliest, reaching
from .selector import LayerView, Selection

CLUSTER_TOKENS = 16  # on average
_RUNS = (1024, 256, 64)  # tokens that are clustered together


@dataclass(frozen=True)
class Tactic:
    """Take clusters of tokens by their centroids.

    Args:
        budget: packed tokens, or their share, that each KV head may attend to, rounded up to clusters; None takes as
            many as reach ``share``.
        share: estimated share of the attention mass to reach without a budget, in ``(0, 1]``.
    """

    budget: Budget | None = None
    share: float = 0.975

    def select(self, query: Tensor, layer: LayerView) -> Selection | None:
        """Return single tokens; see ``Selector.select``."""
        pages, kv_heads, most = layer.row_pages, layer.kv_heads, max(layer.row_pages)
        catch_up(layer)
        plain, scores = layer.plain_mass(query), self._token_scores(query, layer, most)
        if self.budget is None:
            flags, coverage = reaching(scores, self.share, plain, kv_heads)
        else:
            counts = [budget_tokens(self.budget, count * layer.page_size) for count in pages]
            flags = likeliest(scores, scores.logsumexp(-1).logaddexp(plain), counts, kv_heads)
            coverage = coverage_of(scores, flags, plain)
        return Selection(every_page(layer.num_pages, kv_heads, most), flags, coverage)

    def _token_scores(self, query: Tensor, layer: LayerView, most: int) -> Tensor:
        """Give each token the score of its cluster: ``[B, H, most * page_size]`` float32."""
        state, q = layer.state.tensors, layer.grouped(query)  # [B, K, G, D]
        centroids = state["centroids"][:, :, :most].flatten(2, 3).float()  # [B, K, C, D]
        spread = state["spread"][:, :, :most].flatten(2, 3).unsqueeze(2)
        scores = q @ centroids.transpose(-1, -2) + q.square().sum(-1, keepdim=True) * spread * 0.5  # [B, K, G, C]
        member = (state["member"][:, :, :most].long() + _first_clusters(layer, most)).flatten(2)  # [B, K, S]
        tokens = scores.gather(-1, member[:, :, None].expand(-1, -1, scores.shape[2], -1)).flatten(1, 2)
        absent = torch.arange(tokens.shape[-1], device=tokens.device) >= (layer.num_pages * layer.page_size).view(-1, 1)
        return tokens.masked_fill(absent[:, None], -torch.inf) if absent.any() else tokens


def catch_up(layer: LayerView) -> None:
    """Cluster the runs of pages that are new since the last step."""
    state, size = layer.state, layer.page_size
    each, dim = size // CLUSTER_TOKENS, layer.plain_keys.shape[2]
    numbers = {
        "centroids": ((each, dim), torch.float16),
        "spread": ((each,), torch.float32),
        "member": ((size,), torch.uint8),
    }
    pages = layer.row_pages
    if len(state.pages) == len(pages) and state.pages.tolist() == pages:
        return
    sizes = _run_pages(size)
    state.reserve(layer.plain_keys, max(pages), numbers, run=sizes[0])
    for row, count in enumerate(pages):
        known = set(_runs(int(state.pages[row]), sizes))
        for first, length in _runs(count, sizes):
            if (first, length) not in known:
                _cluster_run(layer.keys, layer.block_table[row, first : first + length], state.tensors, row, first)
        state.pages[row] = count


def _cluster_run(keys: KeyPages, page_ids: Tensor, tensors: dict[str, Tensor], row: int, first: int) -> None:
    """Cluster the keys of neighbouring pages and write what describes them."""
    packed = load_key_pages(keys, page_ids, torch.float32).transpose(0, 1)  # [K, N, page_size, D]
    count, size = packed.shape[1:3]
    centroids, member, spread = cluster_keys(packed.flatten(1, 2), CLUSTER_TOKENS)
    place = slice(first, first + count)
    largest = torch.finfo(torch.float16).max
    tensors["centroids"][row, :, place] = centroids.clamp(-largest, largest).unflatten(1, (count, -1)).half()
    tensors["spread"][row, :, place] = spread.unflatten(1, (count, -1))
    tensors["member"][row, :, place] = member.unflatten(1, (count, size)).to(torch.uint8)


def _run_pages(page_size: int) -> list[int]:
    """Pages of the runs, longest first; the shortest is one page, so that none is left over."""
    return sorted({1, *(max(1, tokens // page_size) for tokens in _RUNS)}, reverse=True)


def _runs(pages: int, sizes: list[int]) -> list[tuple[int, int]]:
    """Cut ``pages`` pages into runs ``(first, length)``, the longest that fit first."""
    found, first = [], 0
    for size in sizes:
        while pages - first >= size:
            found.append((first, size))
            first += size
    return found


def _first_clusters(layer: LayerView, most: int) -> Tensor:
    """``[B, 1, most, 1]`` int64: the first cluster of the run of each page, among all clusters of the row."""
    sizes, first = _run_pages(layer.page_size), np.zeros((len(layer.row_pages), most), np.int64)
    for row, count in enumerate(layer.row_pages):
        for start, length in _runs(count, sizes):
            first[row, start : start + length] = start
    clusters = torch.from_numpy(first * (layer.page_size // CLUSTER_TOKENS)).to(layer.num_pages.device)
    return clusters[:, None, :, None]
