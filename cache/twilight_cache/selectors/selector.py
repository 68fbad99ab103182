"""What a selector is: from a query and a layer's pages to the packed tokens that may be attended."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from twilight_kernels import KeyPages

from .state import SelectorState


@dataclass(frozen=True)
class LayerView:
    """What a selector may look at: one layer as a decode step finds it.

    Attributes:
        keys: the layer's key pages.
        block_table: ``[B, P]`` int32, logical page to slot, as wide as the longest row has pages.
        num_pages: ``[B]`` int32, pages of each row.
        plain_keys: ``[B, K, D, C]`` model dtype, sinks and window.
        plain_len: ``[B]`` int32, stored columns of ``plain_keys``; the step's own token is not among them.
        scaling: factor of the logits.
        state: what the selector itself has noted down about these rows.
    """

    keys: KeyPages
    block_table: Tensor
    num_pages: Tensor
    plain_keys: Tensor
    plain_len: Tensor
    scaling: float
    state: SelectorState

    @property
    def page_size(self) -> int:
        return self.keys.codec.page_size

    @property
    def kv_heads(self) -> int:
        return self.plain_keys.shape[1]

    @cached_property
    def row_pages(self) -> list[int]:
        """``num_pages`` as numbers."""
        pages: list[int] = self.num_pages.tolist()
        return pages

    def grouped(self, query: Tensor) -> Tensor:
        """Return ``[B, H, D]`` as scaled float32 ``[B, K, G, D]``, the query heads of a KV head together."""
        grouped: Tensor = (query.float() * self.scaling).unflatten(1, (self.kv_heads, -1))
        return grouped

    def plain_mass(self, query: Tensor) -> Tensor:
        """Return ``[B, H]`` float32, the log-sum-exp of the logits of sinks and window."""
        logits = self.grouped(query) @ self.plain_keys.float()  # [B, K, G, C]
        absent = torch.arange(logits.shape[-1], device=logits.device) >= self.plain_len.view(-1, 1, 1, 1)
        return logits.masked_fill(absent, -torch.inf).logsumexp(-1).flatten(1)


@dataclass(frozen=True)
class Selection:
    """The candidates of one step; sinks and window are attended in any case.

    Attributes:
        pages: ``[B, K, N]`` int32 logical pages, ascending, -1 padded.
        tokens: ``[B, K, N * page_size]`` bool, which of their tokens; None means all of them.
        coverage: ``[B, H]`` float32, the share of the whole attention mass that candidates, sinks and window carry by
            the selector's own estimate; None if it makes none.
    """

    pages: Tensor
    tokens: Tensor | None = None
    coverage: Tensor | None = None


class Selector(Protocol):
    """Choose the packed tokens that a decode step may attend to."""

    def select(self, query: Tensor, layer: LayerView) -> Selection | None:
        """Return the candidates for ``query [B, H, D]`` (model dtype); None for all tokens."""
        ...


@runtime_checkable
class Observer(Protocol):
    """A selector that also looks at the last queries of a prompt."""

    def observe(self, queries: Tensor, layer: LayerView) -> None:
        """Take note of ``queries [B, H, W, D]``, the last of a forward of several tokens, which are stored already."""
        ...
