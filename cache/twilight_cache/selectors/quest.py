"""Quest: the pages whose largest possible logit is largest (arXiv 2406.10774, section 3.2).

The page bound is the key codec's ``(lo, lo + levels * step)``, so it costs no memory of its own. Deviation: the
query heads of a KV head are joined by the largest bound relative to each head's own maximum, not by the union of
their lists, so that every KV head scores the same number of pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twilight_kernels import KeyPages, page_scores


@dataclass(frozen=True)
class Quest:
    """Keep a share of the pages, and at least ``min_tokens`` tokens.

    Args:
        fraction: share of the packed tokens to score, in ``(0, 1]`` (the paper's composition uses 1/4).
        min_tokens: tokens to score at least.
    """

    fraction: float = 0.25
    min_tokens: int = 1024

    def select(
        self, query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float
    ) -> Tensor | None:
        """Return the best pages of each KV head; see ``Selector.select``."""
        size = pages.codec.page_size
        longest = int(num_pages.max())
        count = -(-max(self.min_tokens, round(self.fraction * longest * size)) // size)
        if count >= longest:
            return None
        scores = page_scores(query, pages, block_table[:, :longest], num_pages, scaling)
        scores = scores - scores.amax(-1, keepdim=True)
        joined = scores.unflatten(1, (pages.codes.shape[1], -1)).amax(2)  # [B, K, P]
        best = joined.topk(count, dim=-1)
        # rows without so many pages: absent ones (NaN or -inf) sort last and become -1
        index = torch.where(best.values > -torch.inf, best.indices, longest).sort(-1).values
        return torch.where(index < longest, index, -1).to(torch.int32)
