"""Every packed token is a candidate: the pruner alone decides (Twilight, arXiv 2502.02770, "Full" selector)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .selector import LayerView, Selection


@dataclass(frozen=True)
class Full:
    """Score all pages: ``p`` is then a share of the true mass over packed keys."""

    def select(self, query: Tensor, layer: LayerView) -> Selection | None:
        """Return None: all tokens."""
        return None
