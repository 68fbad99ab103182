"""Every page is a candidate: the pruner alone decides (Twilight, arXiv 2502.02770, "Full" selector)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from twilight_kernels import KeyPages


@dataclass(frozen=True)
class Full:
    """Score all pages: ``p`` is then a share of the true mass over packed keys."""

    def select(
        self, query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float
    ) -> Tensor | None:
        """Return None: all pages."""
        return None
