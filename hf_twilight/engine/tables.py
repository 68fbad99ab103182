"""Where the rows of a step find their pages: one call after the other, of rows that decode and of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twilight_cache import Layout, PromptTables, RowTables, TreePage

from .plan import Segment

_LOGITS_BYTES = 1 << 23  # of scores that one attention call keeps: what fits the caches
_STRIP_ROWS = 16  # of a prompt that are scored against a page together


@dataclass(frozen=True)
class TableMaker:
    """Lists the pages of a step's rows.

    Args:
        layout: where tokens go.
        num_heads: query heads.
        is_raw: whether plain pages serve as packed ones.
        has_prompt_kernels: whether tokens of prompts attend together. Those of answers never do, also where they are
            computed again: what is computed for a token must not depend on how often, or beside what, it is.
        device: of the tables.
    """

    layout: Layout
    num_heads: int
    is_raw: bool
    has_prompt_kernels: bool
    device: torch.device

    def make(self, segments: Sequence[Segment]) -> list[RowTables | PromptTables]:
        """Cut the rows of a step into calls; return the tables of each."""
        tables: list[RowTables | PromptTables] = []
        first = 0
        for is_prompt, parts in groupby(self._parts(segments), self._is_prompt):
            listed = list(parts)
            if not is_prompt:
                tables += self._rows(listed, first)
            for part in listed:
                if is_prompt:
                    tables.append(self._prompt(part, first))
                first += part.end - part.start
        return tables

    def _parts(self, segments: Sequence[Segment]) -> Iterator[Segment]:
        """Cut segments where their prompts end."""
        for segment in segments:
            cut = segment.request.prompt_len
            if segment.start < cut < segment.end:
                yield replace(segment, end=cut)
                yield replace(segment, start=cut)
            else:
                yield segment

    def _is_prompt(self, part: Segment) -> bool:
        return self.has_prompt_kernels and part.end <= part.request.prompt_len

    def _prompt(self, part: Segment, first: int) -> PromptTables:
        sinks, rows = int(self.layout.num_sinks > 0), part.end - part.start
        body = part.request.pages[sinks:]
        skipped, packed = self.layout.pages_after(np.asarray([part.start, part.end - 1])).tolist()
        plain = [*part.request.pages[:sinks], *body[skipped:]]
        return PromptTables(
            first, first + rows, part.start, self.layout.window,
            self._on_device(np.asarray([self._slot(page) for page in body[:packed]], np.int32)),
            self._on_device(np.asarray([plain_slot(page) for page in plain], np.int32)),
            self._stats(rows),
        )  # fmt: skip

    def _slot(self, page: TreePage) -> int | None:
        return page.plain if self.is_raw else page.packed

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _stats(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.num_heads, 5, dtype=torch.float64, device=self.device)

    def _rows(self, segments: Sequence[Segment], base: int) -> Iterator[RowTables]:
        """Cut the rows into calls whose scores fit the caches, and list each row's pages."""
        layout = self.layout
        at = np.concatenate([np.arange(s.start, s.end) for s in segments])
        owner = np.concatenate([np.full(s.end - s.start, i) for i, s in enumerate(segments)])
        num_pages = layout.pages_after(at)
        for first, last in pairwise(self._cuts(num_pages)):
            most = int(num_pages[first:last].max())
            rows = slice(first, last)
            block_table = np.full((last - first, most), -1, np.int32)
            columns = 1 + int(((at - layout.num_sinks) // layout.page_size - num_pages)[rows].max())
            sink_pages = int(layout.num_sinks > 0)
            plain_table = np.zeros((last - first, sink_pages + max(columns, 1 - sink_pages)), np.int32)
            for index in range(owner[first], owner[last - 1] + 1):
                mine = np.flatnonzero(owner[rows] == index)
                pages = segments[index].request.pages
                body = pages[sink_pages:]
                count = int(num_pages[rows][mine].max())
                packed = [self._slot(page) for page in body[:count]]
                block_table[mine, :count] = np.asarray(packed, np.int32)
                plain = np.asarray([plain_slot(page) for page in body] or [0], np.int32)
                if sink_pages:
                    plain_table[mine, 0] = plain_slot(pages[0])
                wanted = num_pages[rows][mine][:, None] + np.arange(plain_table.shape[1] - sink_pages)
                plain_table[mine, sink_pages:] = plain[np.minimum(wanted, len(plain) - 1)]
            plain_len = at[rows] + 1 - num_pages[rows] * layout.page_size
            yield RowTables(
                base + int(first), base + int(last), self._on_device(block_table),
                self._on_device(num_pages[rows].astype(np.int32)), self._on_device(plain_table),
                self._on_device(plain_len.astype(np.int32)), self._stats(int(last - first)), self._strips(owner[rows]),
            )  # fmt: skip

    def _strips(self, owner: NDArray[np.int64]) -> Tensor | None:
        """First rows of the strips of neighbouring rows that have one owner, and the end."""
        starts = np.flatnonzero(np.diff(owner, prepend=-1))
        ends = [*starts[1:].tolist(), len(owner)]
        cut = [row for start, end in zip(starts.tolist(), ends, strict=True) for row in range(start, end, _STRIP_ROWS)]
        return None if len(cut) == len(owner) else self._on_device(np.asarray([*cut, len(owner)], np.int32))

    def _cuts(self, num_pages: NDArray[np.int64]) -> list[int]:
        """Rows at which a new call begins, and the end."""
        size, cuts, most = self.layout.page_size, [0], 0
        for row, pages in enumerate(num_pages.tolist()):
            most = max(most, pages)
            is_full = (row + 1 - cuts[-1]) * most * size * self.num_heads * 4 > _LOGITS_BYTES
            if row > cuts[-1] and is_full:
                cuts.append(row)
                most = pages
        return [*cuts, len(num_pages)]


def plain_slot(page: TreePage) -> int:
    """The slot of a page's plain form; -1 if it has none."""
    return -1 if page.plain is None else page.plain
