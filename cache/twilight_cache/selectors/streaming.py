"""StreamingLLM: sinks and the last tokens, whatever the query (arXiv 2309.17453, section 3.2).

Deviation: nothing is evicted and positions are untouched; only attention is limited.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twilight_kernels import KeyPages


@dataclass(frozen=True)
class Streaming:
    """Score only the last pages (sinks and window are attended to in any case).

    Args:
        recent_tokens: packed tokens before the window to score, rounded up to whole pages.
    """

    recent_tokens: int = 1024

    def select(
        self, query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float
    ) -> Tensor | None:
        """Return the last pages of each row; see ``Selector.select``."""
        count = -(-self.recent_tokens // pages.codec.page_size)
        if count >= int(num_pages.max()):
            return None
        offset = torch.arange(count, device=num_pages.device)
        first = (num_pages.view(-1, 1) - count).clamp_min(0)
        index = first + offset
        index = torch.where(index < num_pages.view(-1, 1), index, -1).to(torch.int32)
        return index[:, None].expand(-1, pages.codes.shape[1], -1).contiguous()
