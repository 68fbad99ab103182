"""Selectors: cheap page scores to candidate pages, one file each."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from twilight_kernels import KeyPages

from .full import Full
from .quest import Quest
from .streaming import Streaming

__all__ = ["SELECTORS", "Full", "Quest", "Selector", "Streaming"]


class Selector(Protocol):
    """Choose the pages whose tokens a decode step scores."""

    def select(
        self, query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float
    ) -> Tensor | None:
        """Return candidate pages.

        Args:
            query: ``[B, H, D]`` model dtype.
            pages: the layer's key pages, on the query's device.
            block_table: ``[B, P]`` int32, logical page to slot.
            num_pages: ``[B]`` int32, pages of each row.
            scaling: factor of the logits.
        Returns:
            ``[B, K, N]`` int32 logical pages, ascending, -1 padded; None for all pages.
        """
        ...


SELECTORS: dict[str, type[Full] | type[Quest] | type[Streaming]] = {
    "full": Full,
    "quest": Quest,
    "streaming": Streaming,
}
