"""What a forward does to one layer's keys and values: take tokens, attend to them, pack and take back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twilight_kernels import (
    DecodeCall,
    KeyCodec,
    KeyPages,
    PlainTokens,
    ValueCodec,
    ValuePages,
    decode_attention,
    prepare_decode,
    store_tokens,
)
from twilight_kernels.skvq import SkvqCodec

from .decode_policy import DecodePolicy
from .decode_stats import DecodeStats
from .layer_tensors import LayerTensors
from .page_codecs import load_pages
from .refined_channels import RefinedChannels
from .selectors import NUM_QUERIES, Full, LayerView, Observer, Selection
from .sequences import Crop, Flush, SequenceBatch, Step


class LayerStore(LayerTensors):
    """One layer of the cache; lengths and block tables are the batch's.

    Args:
        sequences: rows shared by all layers of the cache.
        key_codec, value_codec: how pages are packed, of equal ``page_size``.
        policy: how decode attends.
        refined: key channels that are stored twice; they need packed pages of ``KeyCodec``.
    Attributes:
        tokens: logical tokens that this layer took; others may be a step ahead.
        has_kernels: whether ``attend`` and ``decode`` take this codec; otherwise attention runs over ``read``.
    """

    def __init__(
        self,
        sequences: SequenceBatch,
        key_codec: KeyCodec | SkvqCodec,
        value_codec: ValueCodec | SkvqCodec,
        policy: DecodePolicy,
        refined: RefinedChannels | None = None,
    ) -> None:
        super().__init__(sequences, key_codec, value_codec, refined or RefinedChannels())
        self.policy = policy
        self.has_kernels = isinstance(key_codec, KeyCodec) and isinstance(value_codec, ValueCodec)
        self.tokens = 0
        self.decodes = DecodeStats()
        self._decode_call: tuple[tuple[Any, ...], tuple[int, float], DecodeCall] | None = None

    def append(self, step: Step, keys: Tensor, values: Tensor) -> None:
        """Take the tokens of ``step``: ``keys [B, K, T, Dk]``, ``values [B, K, T, Dv]``, any strides."""
        plain = self._prepare(step, keys, values)
        keys = self.refined.widen(keys)
        self.tokens = step.start + step.count
        flushes = {flush.row: flush for flush in step.flushes}
        for row in range(keys.shape[0]):
            first, before = int(step.first_new[row]), int(step.plain[row])
            if first == step.count:
                continue
            row_keys, row_values = keys[row, :, first:], values[row, :, first:]  # [K, T, D]
            if before:
                old_keys = plain.keys[row, :, :, :before].transpose(-1, -2)
                row_keys = torch.cat([old_keys, row_keys], 1)
                row_values = torch.cat([plain.values[row, :, :before], row_values], 1)
            self._settle_row(row, row_keys, row_values, flushes.get(row))

    def decode(self, step: Step, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Take one token a row and attend to everything: ``query [B, H, D]`` to ``[B, H, Dv]``.

        ``keys [B, K, 1, Dk]`` and ``values [B, K, 1, Dv]`` are the step's; no row may be padding at this step.
        """
        self._prepare(step, keys, values)
        self.tokens = step.start + step.count
        out = self.attend(query, scaling, step, keys[:, :, 0], values[:, :, 0])
        if step.flushes:
            self.flush(step.flushes)
        return out

    def make_room(self, step: Step, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        """Make room for a step, and for all pages of the pool, so that tensors stay where they are.

        A store without tokens learns their shapes from another's: ``keys [B, K, T, Dk]``, ``values [B, K, T, Dv]``.
        """
        if self.plain is not None:
            keys, values = self.plain.keys, self.plain.values
        assert keys is not None and values is not None
        self._prepare(step, keys, values)
        self._grow_pages()

    def attend(
        self, query: Tensor, scaling: float, step: Step, new_key: Tensor | None, new_value: Tensor | None
    ) -> Tensor:
        """Attend to the sequences as ``step`` left them, before its own pages were packed.

        ``query [B, H, D]``; ``new_key [B, K, D]`` and ``new_value [B, K, Dv]`` are appended first, if given.
        """
        selection = self.select(query, scaling, step)
        policy, tables = self.policy, step.tables(query.device)
        stats = self.decodes.begin(query, selection, tables[1], -(-policy.min_sparse_len // self.key_codec.page_size))
        if selection is None and new_key is not None and new_value is not None:
            return self.prepared(query.shape[1], scaling, stats)(query, new_key, new_value, *tables)
        assert isinstance(self.keys, KeyPages) and isinstance(self.values, ValuePages) and self.plain is not None
        block_table, num_pages, plain_len = tables
        return decode_attention(
            query,
            self.keys,
            self.values,
            self.plain,
            block_table=block_table,
            num_pages=num_pages,
            plain_len=plain_len,
            scaling=scaling,
            new_key=new_key,
            new_value=new_value,
            p=policy.p,
            min_keep=policy.min_keep,
            min_sparse_len=policy.min_sparse_len,
            candidates=None if selection is None else selection.pages,
            candidate_tokens=None if selection is None else selection.tokens,
            stats=stats,
            refined=self.refined_index,
        )

    def prepared(self, heads: int, scaling: float, stats: Tensor) -> DecodeCall:
        """Return a step of ``heads`` query heads over the tensors as they are, prepared once as long as none moves."""
        tensors, made = (self.keys, self.values, self.plain, self.refined_index, stats), self._decode_call
        if made is not None and all(map(is_, made[0], tensors)) and made[1] == (heads, scaling):
            return made[2]
        assert isinstance(self.keys, KeyPages) and isinstance(self.values, ValuePages) and self.plain is not None
        policy = self.policy
        call = prepare_decode(
            self.keys, self.values, self.plain, heads=heads, scaling=scaling, p=policy.p, min_keep=policy.min_keep,
            min_sparse_len=policy.min_sparse_len, stats=stats, refined=self.refined_index,
        )  # fmt: skip
        self._decode_call = tensors, (heads, scaling), call
        return call

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has; a prepared step holds for the original's tensors."""
        return {**vars(self), "_decode_call": None}

    def select(self, query: Tensor, scaling: float, step: Step) -> Selection | None:
        """Return the candidates of a step for ``query [B, H, D]``; None if every packed token is one."""
        policy, pages = self.policy, step.most_pages
        if type(policy.selector) is Full or not pages or pages * self.key_codec.page_size < policy.min_sparse_len:
            return None
        block_table, num_pages, plain_len = step.tables(query.device)
        view = self._view(block_table, num_pages, plain_len - 1, scaling)
        return policy.selector.select(self.widened(query), view)

    def observe(self, queries: Tensor, scaling: float) -> None:
        """Show the selector the queries ``[B, H, T, D]`` of a forward of several tokens, which are stored already."""
        selector, sequences = self.policy.selector, self.sequences
        if not _observes(type(selector)) or not self.has_kernels or not sequences.pages.any():
            return
        assert isinstance(selector, Observer)
        last = min(NUM_QUERIES, sequences.layout.window, queries.shape[2])
        most, device = int(sequences.pages.max()), queries.device
        tables = sequences.table[:, :most], sequences.pages.astype(np.int32), sequences.plain.astype(np.int32)
        block_table, num_pages, plain_len = (torch.from_numpy(table.copy()).to(device) for table in tables)
        queries = torch.stack([self.widened(query) for query in queries[:, :, -last:].detach().unbind(2)], 2)
        selector.observe(queries, self._view(block_table, num_pages, plain_len, scaling))

    def _view(self, block_table: Tensor, num_pages: Tensor, plain_len: Tensor, scaling: float) -> LayerView:
        assert isinstance(self.keys, KeyPages) and self.plain is not None
        return LayerView(self.keys, block_table, num_pages, self.plain.keys, plain_len, scaling, self.selector_state)

    def flush(self, flushes: Sequence[Flush]) -> None:
        """Pack pages out of the windows, which must hold them already."""
        if not flushes:
            return
        plain, size, sinks = self.plain, self.key_codec.page_size, self.sequences.layout.num_sinks
        assert plain is not None
        self._grow_pages()
        for flush in flushes:
            end = sinks + len(flush.page_ids) * size
            keys = plain.keys[flush.row, :, :, sinks:end].transpose(-1, -2)
            if self.refined.count:
                keys = keys.clone()
                self._refine(flush, keys)
            self._store(flush.page_ids, keys, plain.values[flush.row, :, sinks:end])
            plain.keys[flush.row, :, :, sinks : sinks - end] = plain.keys[flush.row, :, :, end:].clone()
            plain.values[flush.row, :, sinks : sinks - end] = plain.values[flush.row, :, end:].clone()

    def read(self) -> tuple[Tensor, Tensor]:
        """Dequantize everything: ``[B, K, S, Dk]``, ``[B, K, S, Dv]`` in the model's dtype, padding zeroed."""
        plain, sinks = self.plain, self.sequences.layout.num_sinks
        assert plain is not None and self.keys is not None and self.values is not None
        batch, heads, key_dim, _ = plain.keys.shape
        dtype, device = plain.keys.dtype, plain.keys.device
        total = self.tokens
        keys = torch.zeros(batch, heads, total, key_dim, dtype=dtype, device=device)
        values = torch.zeros(batch, heads, total, plain.values.shape[-1], dtype=dtype, device=device)
        pages_of, plain_of = self.sequences.at(total)
        for row in range(batch):
            pad, pages, columns = int(self.sequences.pad[row]), int(pages_of[row]), int(plain_of[row])
            first = min(columns, sinks)
            at = pad + first
            keys[row, :, pad:at] = plain.keys[row, :, :, :first].transpose(-1, -2)
            values[row, :, pad:at] = plain.values[row, :, :first]
            if pages:
                page_ids = torch.from_numpy(self.sequences.table[row, :pages]).to(device)
                end = at + pages * self.key_codec.page_size
                keys[row, :, at:end] = load_pages(self.keys, page_ids, dtype).transpose(0, 1).flatten(1, 2)
                values[row, :, at:end] = load_pages(self.values, page_ids, dtype).transpose(0, 1).flatten(1, 2)
                at = end
            keys[row, :, at:total] = plain.keys[row, :, :, first:columns].transpose(-1, -2)
            values[row, :, at:total] = plain.values[row, :, first:columns]
        return self._folded(keys), values

    def crop(self, crops: Sequence[Crop]) -> None:
        """Cut rows; tokens of a page that is cut through come back into the window, dequantized."""
        self.tokens = self.sequences.tokens
        plain, sinks = self.plain, self.sequences.layout.num_sinks
        if plain is None or self.keys is None or self.values is None:
            return
        for crop in crops:
            self.selector_state.crop(crop.row, int(self.sequences.pages[crop.row]))
            if crop.restored:
                page_id = torch.tensor([crop.page_id], dtype=torch.int32, device=plain.keys.device)
                keys = load_pages(self.keys, page_id, plain.keys.dtype)[0, :, : crop.restored]
                values = load_pages(self.values, page_id, plain.values.dtype)[0, :, : crop.restored]
                keys = self.refined.widen(self._folded(keys[None], slice(crop.row, crop.row + 1))[0])
                plain.keys[crop.row, :, :, sinks : sinks + crop.restored] = keys.transpose(-1, -2)
                plain.values[crop.row, :, sinks : sinks + crop.restored] = values

    def select_rows(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows: only sinks and window are copied."""
        super().select_rows(rows)
        if self.plain is not None:
            self.decodes.select_rows(rows.to(self.plain.keys.device))

    def clear(self) -> None:
        """Drop every tensor."""
        super().clear()
        self.decodes.clear()
        self.tokens = 0

    def _prepare(self, step: Step, keys: Tensor, values: Tensor) -> PlainTokens:
        """Make room for the step."""
        # a long step goes from its input to pages; only what stays plain needs room
        needed = step.most_plain if step.count == 1 else step.most_kept
        if self.plain is None or needed > self.plain.capacity:
            self._make_room(needed, keys, values)
        assert self.plain is not None
        return self.plain

    def _settle_row(self, row: int, keys: Tensor, values: Tensor, flush: Flush | None) -> None:
        """Pack and keep a row's plain and new tokens, ``[K, T, D]``, in order."""
        plain, sinks = self.plain, self.sequences.layout.num_sinks
        assert plain is not None and self.keys is not None and self.values is not None
        page_ids: list[int] = [] if flush is None else flush.page_ids
        if flush is not None:
            self._grow_pages()
            if self.refined.count:
                self._refine(flush, keys[:, sinks : sinks + len(page_ids) * self.key_codec.page_size])
        if isinstance(self.keys, KeyPages) and isinstance(self.values, ValuePages):
            ids = torch.tensor(page_ids, dtype=torch.int32, device=keys.device)
            store_tokens(self.keys, self.values, plain, ids, keys, values, row=row, num_sinks=sinks)
            return
        paged = plain.take(row, keys, values, len(page_ids) * self.key_codec.page_size, sinks)
        if page_ids:
            self._store(page_ids, *paged)


@cache
def _observes(kind: type) -> bool:
    """Whether selectors of this kind want to see queries; noted down, because asking a protocol is slow."""
    return issubclass(kind, Observer)
