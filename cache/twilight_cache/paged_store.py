"""One layer's pages for many sequences: plain ones that windows read, packed ones before them.

The pools are allocated whole: on CPUs memory is taken when it is first written to. A raw codec has no packed pages
of its own; the plain ones serve as both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twilight_kernels import (
    KeyCodec,
    KeyPages,
    PlainTokens,
    ValueCodec,
    ValuePages,
    decode_attention,
    prompt_attention,
    repeat_channels,
    store_key_pages,
    store_value_pages,
)

from .decode_policy import DecodePolicy
from .refined_channels import RefinedChannels


@dataclass(frozen=True)
class RowTables:
    """Where the rows of a step find what they attend to; a row is one query token.

    Attributes:
        first, last: rows ``[first, last)`` of the step.
        block_table: ``[R, P]`` int32 slots of packed pages.
        num_pages: ``[R]`` int32.
        plain_table: ``[R, C]`` int32 slots of plain pages: sinks, then window.
        plain_len: ``[R]`` int32 plain tokens, the row's own included.
        stats: ``[R, H, 5]`` float64, see ``decode_attention``; shared by all layers of a step.
        strips: ``[S + 1]`` int32 first rows of the strips that list the same pages; None if there are none.
    """

    first: int
    last: int
    block_table: Tensor
    num_pages: Tensor
    plain_table: Tensor
    plain_len: Tensor
    stats: Tensor
    strips: Tensor | None


@dataclass(frozen=True)
class PromptTables:
    """Where neighbouring tokens of a prompt find what they attend to.

    Attributes:
        first, last: rows ``[first, last)`` of the step.
        start: position of the first.
        window: last tokens of a sequence, which are plain.
        block_table: ``[P]`` int32 slots of packed pages, all that the last token reads.
        plain_table: ``[C]`` int32 slots of plain pages: sinks, then from the first on that the first token reads plain.
        stats: ``[R, H, 5]`` float64, see ``decode_attention``; shared by all layers of a step.
    """

    first: int
    last: int
    start: int
    window: int
    block_table: Tensor
    plain_table: Tensor
    stats: Tensor


class PagedStore:
    """The tensors of one layer.

    Args:
        key_codec, value_codec: how pages are packed, of equal ``page_size``.
        policy: how rows attend; every packed token is a candidate, whatever its selector.
        refined: key channels that are stored twice.
        num_sinks: first tokens of a sequence, which have a plain page of their own.
        plain_pages, packed_pages: slots; ``packed_pages`` is 0 if both codecs are raw.
        kv_heads, key_dim, value_dim: shape of the layer.
        dtype: of the model.
        device: of the model.
    """

    def __init__(
        self,
        key_codec: KeyCodec,
        value_codec: ValueCodec,
        policy: DecodePolicy,
        refined: RefinedChannels,
        *,
        num_sinks: int,
        plain_pages: int,
        packed_pages: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.policy, self.num_sinks = policy, num_sinks
        self.refined = refined
        # by packed slot: which channels are refined in sequences that begin with that page
        self._refined_index = refined.begin(packed_pages, kv_heads, device, torch.int16)
        size, key_dim = key_codec.page_size, key_dim + refined.count
        self.plain = PlainTokens(
            torch.empty(plain_pages, kv_heads, key_dim, size, dtype=dtype, device=device),
            torch.empty(plain_pages, kv_heads, size, value_dim, dtype=dtype, device=device),
        )
        self.keys = KeyPages.empty(packed_pages, kv_heads, key_dim, key_codec, dtype, device)
        self.values = ValuePages.empty(packed_pages, kv_heads, value_dim, value_codec, dtype, device)
        if not packed_pages:
            self.keys = KeyPages(key_codec, self.plain.keys, self.keys.lo, self.keys.step)
            self.values = ValuePages(value_codec, self.plain.values, self.values.lo, self.values.step)

    def write(self, slots: Tensor, offsets: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put tokens ``[T, K, D]`` into plain pages ``slots [T]`` at columns ``offsets [T]``."""
        self.plain.keys[slots, :, :, offsets] = self.refined.widen(keys)
        self.plain.values[slots, :, offsets] = values

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy the first tokens of plain pages, ``(source, target, count)``, one after the other."""
        for source, target, count in copies:
            self.plain.keys[target, :, :, :count] = self.plain.keys[source, :, :, :count]
            self.plain.values[target, :, :count] = self.plain.values[source, :, :count]

    def pack(self, plain: Tensor, packed: Tensor, first: Tensor) -> None:
        """Pack the plain pages ``plain [N]`` into the slots ``packed [N]``.

        ``first [N]`` are the slots of the first packed page of each page's sequence, packed before or now.
        """
        keys = self.plain.keys[plain].transpose(-1, -2)
        if self.refined.count:
            exact = keys[..., : -self.refined.count]
            self._refined_index[packed] = self.refined.choose(exact).to(torch.int16)
            self.refined.write_rests(keys, self._index_of(first), self.keys.codec)
        store_key_pages(self.keys, packed, keys)
        store_value_pages(self.values, packed, self.plain.values[plain])

    def attend(self, query: Tensor, tables: RowTables | PromptTables, scaling: float) -> Tensor:
        """Attend rows ``[R, H, D]`` to what their tables list: ``[R, H, Dv]``."""
        policy = self.policy
        if isinstance(tables, PromptTables):
            if self.refined.count:
                index = self._index_of_rows(tables.block_table[None])
                query = repeat_channels(query, index.expand(query.shape[0], -1, -1))
            return prompt_attention(
                query,
                self.keys,
                self.values,
                self.plain,
                block_table=tables.block_table,
                plain_table=tables.plain_table,
                start=tables.start,
                num_sinks=self.num_sinks,
                window=tables.window,
                scaling=scaling,
                p=policy.p,
                min_keep=policy.min_keep,
                min_sparse_len=policy.min_sparse_len,
                stats=tables.stats,
            )
        return decode_attention(
            query,
            self.keys,
            self.values,
            self.plain,
            block_table=tables.block_table,
            num_pages=tables.num_pages,
            plain_len=tables.plain_len,
            scaling=scaling,
            p=policy.p,
            min_keep=policy.min_keep,
            min_sparse_len=policy.min_sparse_len,
            stats=tables.stats,
            plain_table=tables.plain_table,
            num_sinks=self.num_sinks,
            strips=tables.strips,
            refined=self._index_of_rows(tables.block_table) if self.refined.count else None,
        )

    def _index_of(self, first: Tensor) -> Tensor:
        return self._refined_index[first.long()].long()

    def _index_of_rows(self, block_table: Tensor) -> Tensor:
        """Refined channels ``[R, K, count]`` of rows that list the pages ``[R, P]``."""
        rows, columns = block_table.shape
        if not columns:
            return self.refined.begin(rows, self._refined_index.shape[1], block_table.device)
        return self._index_of(block_table[:, 0])

    def num_bytes(self) -> tuple[int, int]:
        """Bytes of one plain page and of one packed page."""
        plain = (self.plain.keys.nbytes + self.plain.values.nbytes) // max(1, self.plain.keys.shape[0])
        if self.keys.codes is self.plain.keys:
            return plain, 0
        tensors = [*self.keys.tensors().values(), *self.values.tensors().values(), self._refined_index]
        return plain, sum(tensor.nbytes for tensor in tensors) // max(1, self.keys.num_pages)
