"""Block tables and lengths of a batch of sequences, shared by every layer.

A sequence is ``sinks | packed pages | window``. In real tokens, padding left out:

    interval                                   where
    [0, num_sinks)                             plain columns [0, num_sinks)
    [num_sinks, num_sinks + pages * page_size) pages 0 .. pages of the block table
    the rest                                   plain columns from num_sinks on

New tokens join the window; when it holds ``window + page_size`` tokens its oldest ``page_size`` leave as one page.
So page boundaries are fixed by position, and the state after n tokens does not depend on how they were fed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .pool import PagePool

# most tokens that a draft (assisted decoding) may add and take back without touching a page
DRAFT_SLACK = 64


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a sequence go.

    Args:
        page_size: tokens of a page.
        num_sinks: first tokens, kept in the model's dtype.
        window: last tokens, kept in the model's dtype; at least 1.
    """

    page_size: int = 64
    num_sinks: int = 4
    window: int = 128

    def pages_after(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Pages that sequences of ``tokens`` tokens have packed."""
        return np.maximum(0, (tokens - self.num_sinks - self.window) // self.page_size)


@dataclass(frozen=True)
class Flush:
    """Pages that one row packs: logical pages ``first ..``, into the slots ``page_ids``."""

    row: int
    first: int
    page_ids: list[int]


@dataclass
class Step:
    """What one forward does to every layer, worked out once.

    Attributes:
        start, count: logical tokens ``[start, start + count)``, padding included.
        first_new: ``[B]`` first column of the step that is a real token.
        pages, plain: ``[B]`` pages and plain tokens of each row before the step.
        most_pages, most_plain: largest of ``num_pages`` and ``plain_len``, as numbers.
        most_kept: plain tokens of the longest row after ``flushes``.
        flushes: pages to pack once the tokens are in.
        num_pages, plain_len, block_table: int32 tensors for decode kernels, the step's token included.
    """

    start: int
    count: int
    first_new: NDArray[np.int64]
    pages: NDArray[np.int64]
    plain: NDArray[np.int64]
    most_pages: int
    most_plain: int
    most_kept: int
    flushes: list[Flush]
    num_pages: Tensor
    plain_len: Tensor
    block_table: Tensor
    _placed: tuple[Tensor, Tensor, Tensor] | None = None

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Block table, pages and plain tokens of each row on ``device``, copied there once for all of its layers."""
        if self._placed is None or self._placed[0].device != device:
            self._placed = self.block_table.to(device), self.num_pages.to(device), self.plain_len.to(device)
        return self._placed


@dataclass(frozen=True)
class Crop:
    """A row that is cut through page ``page_id``: its first ``restored`` tokens come back into the window."""

    row: int
    restored: int
    page_id: int


@dataclass
class SequenceBatch:
    """The rows of a batch: padding, lengths, block tables.

    Attributes:
        layout: where tokens go.
        pool: owner of the pages.
        tokens: logical tokens of every row so far, padding included.
        pad: ``[B]`` leading padding tokens of each row; they are never stored.
        pages: ``[B]`` packed pages of each row.
        table: ``[B, max_pages]`` int32, logical page to slot, -1 where none.
        is_recording: whether drafts may be taken back, so that packing waits until they are settled.
    """

    layout: Layout
    pool: PagePool
    tokens: int = 0
    pad: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    pages: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    table: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    is_recording: bool = False
    _step: Step | None = None
    _accepted: tuple[int, Sequence[int]] = (-1, ())

    @property
    def batch_size(self) -> int:
        """Rows, 0 before the first step."""
        return len(self.pad)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``[B]`` real tokens of each row."""
        return np.maximum(0, self.tokens - self.pad)

    @property
    def plain(self) -> NDArray[np.int64]:
        """``[B]`` tokens of each row that are not packed."""
        return self.lengths - self.pages * self.layout.page_size

    def at(self, tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``[B]`` pages and plain tokens of each row when the cache held ``tokens``: now, or before this step."""
        if tokens == self.tokens:
            return self.pages, self.plain
        assert self._step is not None and self._step.start == tokens, "a layer fell behind"
        return self._step.pages, self._step.plain

    def accepts_padding(self, pad: Sequence[int], start: int) -> bool:
        """Whether rows padded like this continue what is stored: same padding wherever a token is stored."""
        if start == 0 or not self.batch_size or (start, pad) == self._accepted:
            return True
        given = np.asarray(pad, np.int64)
        stored = start > self.pad
        if not ((given[stored] == self.pad[stored]).all() and (given[~stored] >= start).all()):
            return False
        self._accepted = (start, list(pad))  # the next layer of this forward asks the same
        return True

    def begin(self, start: int, count: int, batch: int, pad: Sequence[int] | None = None) -> Step:
        """Take ``count`` tokens at ``start`` into every row; the same step for all layers of one forward.

        Args:
            start: logical tokens that the calling layer holds.
            count: tokens of the forward, padding included.
            batch: rows.
            pad: leading padding of each row; None leaves it as it is.
        Raises:
            ValueError: the batch size changed, or layers see different tokens.
            MemoryError: the pool has no pages left; nothing is taken then.
        """
        step = self._step
        if step is not None and step.start == start and step.count == count and start + count == self.tokens:
            return step
        if start != self.tokens:
            raise ValueError(
                f"every layer must see the same tokens, got one at {start} where the cache holds {self.tokens}; "
                "use one cache per model and run whole forwards"
            )
        if not self.batch_size:
            self.pad, self.pages = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
            self.table = np.full((batch, 0), -1, np.int32)
        if batch != self.batch_size:
            raise ValueError(
                f"the cache holds {self.batch_size} sequences, got a batch of {batch}; use a new cache, or "
                "batch_select_indices / batch_repeat_interleave to change its rows"
            )
        if pad is not None:
            self.pad = np.asarray(pad, np.int64).copy()
        pages, plain = self.pages.copy(), self.plain
        self.tokens += count
        plain_len = self.lengths - pages * self.layout.page_size
        try:
            flushes = self._flush(DRAFT_SLACK if self.is_recording else 0)
        except MemoryError:
            self.tokens -= count  # a refused step does not count
            raise
        self._step = Step(
            start=start,
            count=count,
            first_new=np.clip(self.pad - start, 0, count),
            pages=pages,
            plain=plain,
            most_pages=int(pages.max()),
            most_plain=int(plain_len.max()),
            most_kept=int(self.plain.max()),
            flushes=flushes,
            num_pages=torch.from_numpy(pages.astype(np.int32)),
            plain_len=torch.from_numpy(plain_len.astype(np.int32)),
            block_table=torch.from_numpy(np.ascontiguousarray(self.table[:, : int(pages.max())])),
        )
        return self._step

    def settle(self) -> list[Flush]:
        """Pack what waited for drafts to be settled; return the pages to pack."""
        self._step, self._accepted = None, (-1, ())
        return self._flush(0)

    def crop(self, count: int) -> list[Crop]:
        """Take the last ``count`` tokens back from every row; return what each layer must do."""
        self._step, self._accepted = None, (-1, ())
        size, sinks = self.layout.page_size, self.layout.num_sinks
        self.tokens = max(0, self.tokens - count)
        crops = []
        for row, length in enumerate(self.lengths.tolist()):
            pages = int(self.pages[row])
            kept = min(pages, max(0, length - sinks) // size)
            if kept == pages:
                continue
            crops.append(Crop(row, max(0, length - sinks - kept * size), int(self.table[row, kept])))
            self.pool.release(self.table[row, kept:pages].tolist())
            self.table[row, kept:] = -1
            self.pages[row] = kept
        return crops

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep, repeat or reorder rows; pages are shared, never copied."""
        self._step, self._accepted = None, (-1, ())
        index = np.asarray(rows, np.int64)
        old = self._owned()
        self.pad, self.pages, self.table = self.pad[index], self.pages[index], self.table[index]
        self.pool.retain(self._owned())
        self.pool.release(old)

    def adopt(self, table: NDArray[np.int32]) -> None:
        """Take over a block table whose pages are numbered ``0 .. n``; ``pages`` must be set already."""
        self.table = table
        owned = self._owned()
        self.pool.adopt(np.bincount(np.asarray(owned, np.int64)).tolist() if owned else [])

    def clear(self) -> None:
        """Give every page back and forget all rows."""
        self.pool.release(self._owned())
        self.tokens, self.is_recording = 0, False
        self._step, self._accepted = None, (-1, ())
        self.pad, self.pages = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.table = np.zeros((0, 0), np.int32)

    def _owned(self) -> list[int]:
        return [page for row, count in enumerate(self.pages) for page in self.table[row, :count].tolist()]

    def _flush(self, slack: int) -> list[Flush]:
        """Allot pages to tokens that left the window."""
        target = np.maximum(self.pages, self.layout.pages_after(self.lengths - slack))
        most = int(target.max(initial=0))
        if most > self.table.shape[1]:
            grown = np.full((self.batch_size, most + max(4, most // 4)), -1, np.int32)
            grown[:, : self.table.shape[1]] = self.table
            self.table = grown
        taken = iter(self.pool.allocate(int((target - self.pages).sum())))  # all rows' or none
        flushes = []
        for row in np.flatnonzero(target > self.pages).tolist():
            first, last = int(self.pages[row]), int(target[row])
            page_ids = list(islice(taken, last - first))
            self.table[row, first:last] = page_ids
            flushes.append(Flush(row, first, page_ids))
        self.pages = target
        return flushes
