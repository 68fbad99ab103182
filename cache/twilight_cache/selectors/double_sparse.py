"""Double Sparsity: tokens chosen by a few heavy channels of their keys (arXiv 2408.07092, section 3).

Deviations. The paper fixes the channels offline and keeps a label cache, a copy of those channels at low precision.
Our pages are channel-major, so that any channel of a page is one contiguous read: the packed codes *are* the label
cache, at no memory, and the channels are chosen by the step's own query and the ranges of the pages (as SparQ, arXiv
2312.04985, does with the query alone), so that nothing is calibrated. Channels that are not read count as the middle
of their range instead of nothing. On the embedded model 16 of 64 channels so chosen find candidates whose mass is
within half a percent of the best possible at equal number.

Without a budget (not in the paper) the scores, being logits but for what was not read, say how many tokens to take.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from twilight_kernels import channel_logits

from .budget import Budget, budget_tokens, coverage_of, every_page, likeliest, reaching
from .selector import LayerView, Selection


@dataclass(frozen=True)
class DoubleSparse:
    """Take the tokens of the largest approximate logits.

    Args:
        budget: packed tokens, or their share, that each KV head may attend to; None takes as many as reach ``share``.
        share: estimated share of the attention mass to reach without a budget, in ``(0, 1]``.
        channel_share: share of the channels to read, in ``(0, 1]`` (the paper: 1/8 to 1/2).
    """

    budget: Budget | None = None
    share: float = 0.975
    channel_share: float = 0.25

    def select(self, query: Tensor, layer: LayerView) -> Selection | None:
        """Return single tokens; see ``Selector.select``."""
        size, pages, kv_heads = layer.page_size, layer.row_pages, layer.kv_heads
        channels = max(1, round(self.channel_share * query.shape[-1]))
        scores = channel_logits(query, layer.keys, channels, layer.block_table, layer.num_pages, layer.scaling)
        plain = layer.plain_mass(query)
        if self.budget is None:
            flags, coverage = reaching(scores, self.share, plain, kv_heads)
        else:
            counts = [budget_tokens(self.budget, count * size) for count in pages]
            flags = likeliest(scores, scores.logsumexp(-1).logaddexp(plain), counts, kv_heads)
            coverage = coverage_of(scores, flags, plain)
        return Selection(every_page(layer.num_pages, kv_heads, max(pages)), flags, coverage)
