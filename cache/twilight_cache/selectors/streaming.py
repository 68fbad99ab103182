"""StreamingLLM: sinks and the last tokens, whatever the query (arXiv 2309.17453, section 3.2).

Deviation: nothing is evicted and positions are untouched; only attention is limited.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import Budget, budget_tokens
from .selector import LayerView, Selection


@dataclass(frozen=True)
class Streaming:
    """Take only the last pages (sinks and window are attended to in any case).

    Args:
        budget: packed tokens before the window, or their share, to attend to, rounded up to whole pages.
    """

    budget: Budget = 0.25

    def select(self, query: Tensor, layer: LayerView) -> Selection | None:
        """Return the last pages of each row; see ``Selector.select``."""
        size, pages = layer.page_size, layer.row_pages
        counts = [-(-budget_tokens(self.budget, count * size) // size) for count in pages]
        if counts == pages:
            return None
        offset = torch.arange(max(1, *counts), device=query.device)
        count = torch.tensor(counts, device=query.device).view(-1, 1)
        index = layer.num_pages.view(-1, 1) - count + offset
        index = torch.where(offset < count, index, -1).to(torch.int32)
        return Selection(index[:, None].expand(-1, layer.kv_heads, -1))
