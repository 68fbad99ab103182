"""Quest: the pages whose largest possible logit is largest (arXiv 2406.10774, section 3.2).

The page bound is the key codec's ``(lo, lo + levels * step)``, so it costs no memory of its own; a page is the
cache's ``page_size`` (the paper: 16 tokens). Deviations: the query heads of a KV head are joined by the largest bound
relative to each head's own maximum, not by the union of their lists, so that a budget is the same for every KV head.
Without a budget (not in the paper) pages are taken until their *estimated* mass reaches a share: a bound is no mass
(its softmax is off by orders of magnitude), so the estimate is that of ``twilight_kernels.page_masses``, from the
same two numbers a channel. It is right on average, and far too high for single heads whose pages hold an outlier:
``coverage`` is then no promise, and a page is coarse in any case (docs/decisions.md): small pages help most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twilight_kernels import page_masses, page_scores

from .budget import Budget, budget_tokens, likeliest, listed, reaching
from .selector import LayerView, Selection


@dataclass(frozen=True)
class Quest:
    """Take the best pages.

    Args:
        budget: packed tokens, or their share, that each KV head may attend to, rounded up to pages; None takes pages
            until ``share`` is reached.
        share: estimated share of the attention mass to reach without a budget, in ``(0, 1]``.
    """

    budget: Budget | None = None
    share: float = 0.975

    def select(self, query: Tensor, layer: LayerView) -> Selection | None:
        """Return whole pages; see ``Selector.select``."""
        keys, table, num_pages = layer.keys, layer.block_table, layer.num_pages
        if self.budget is None:
            masses = page_masses(query, keys, table, num_pages, layer.scaling)
            flags, coverage = reaching(masses, self.share, layer.plain_mass(query), layer.kv_heads)
            return Selection(listed(flags), coverage=coverage)
        size = layer.page_size
        counts = [-(-budget_tokens(self.budget, pages * size) // size) for pages in layer.row_pages]
        if counts == layer.row_pages:
            return None
        scores = page_scores(query, keys, table, num_pages, layer.scaling)
        flags = likeliest(scores, scores.amax(-1).clamp_min(-torch.finfo(torch.float32).max), counts, layer.kv_heads)
        return Selection(listed(flags))
