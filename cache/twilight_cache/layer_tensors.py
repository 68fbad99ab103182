"""What one layer keeps: packed pages, sinks and window, and which key channels are refined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twilight_kernels import KeyCodec, KeyPages, PlainTokens, ValueCodec, ValuePages, repeat_channels
from twilight_kernels.skvq import SkvqCodec, SkvqPages

from .accounting import LayerBytes
from .page_codecs import changed, empty_keys, empty_values, store_pages, token_bytes
from .refined_channels import RefinedChannels
from .selectors import SelectorState
from .sequences import Flush, SequenceBatch


class LayerTensors:
    """The persistent tensors of one layer: how they grow, are packed, move and count.

    Args:
        sequences: rows shared by all layers of the cache.
        key_codec, value_codec: how pages are packed, of equal ``page_size``.
        refined: key channels that are stored twice; they need packed pages of ``KeyCodec``.
    Attributes:
        keys, values, plain: pages, sinks and window; None before the first token.
        refined_index: ``[B, K, R]`` int64, the refined channels of each row; None if there are none.
        selector_state: what the selector noted down about the rows.
    """

    def __init__(
        self,
        sequences: SequenceBatch,
        key_codec: KeyCodec | SkvqCodec,
        value_codec: ValueCodec | SkvqCodec,
        refined: RefinedChannels,
    ) -> None:
        self.sequences, self.refined = sequences, refined
        self.key_codec, self.value_codec = key_codec, value_codec
        self.keys: KeyPages | SkvqPages | None = None
        self.values: ValuePages | SkvqPages | None = None
        self.plain: PlainTokens | None = None
        self.refined_index: Tensor | None = None
        self.selector_state = SelectorState()

    def widened(self, query: Tensor) -> Tensor:
        """Return queries ``[B, H, D]`` as the kernels take them: refined channels twice."""
        return query if self.refined_index is None else repeat_channels(query.detach(), self.refined_index)

    def _folded(self, keys: Tensor, rows: slice = slice(None)) -> Tensor:
        return keys if self.refined_index is None else self.refined.fold(keys, self.refined_index[rows])

    @torch.inference_mode(mode=False)  # a tensor made in that mode could not be written to outside of it
    def _make_room(self, needed: int, keys: Tensor, values: Tensor) -> None:
        """Allocate for tokens like ``[B, K, T, D]``, or widen, so that each row has ``needed`` plain columns."""
        plain = self.plain
        if plain is None:
            layout = self.sequences.layout
            room = max(needed, layout.num_sinks + layout.window + layout.page_size)
            rows, heads, key_dim = *keys.shape[:2], keys.shape[3] + self.refined.count
            self.plain = PlainTokens.empty(rows, heads, key_dim, values.shape[-1], room, keys.dtype, keys.device)
            pages = self.sequences.pool.capacity
            self.keys = empty_keys(pages, self.key_codec, heads, key_dim, keys.dtype, keys.device)
            self.values = empty_values(pages, self.value_codec, heads, values.shape[-1], keys.dtype, keys.device)
            self.refined_index = self.refined.begin(rows, heads, keys.device) if self.refined.count else None
        else:
            rows, heads, key_dim, _ = plain.keys.shape
            room = needed + needed // 8
            wider = PlainTokens.empty(rows, heads, key_dim, values.shape[-1], room, keys.dtype, keys.device)
            wider.keys[..., : plain.capacity] = plain.keys
            wider.values[:, :, : plain.capacity] = plain.values
            self.plain = wider

    def _grow_pages(self) -> None:
        """Size the page tensors to the pool."""
        assert self.keys is not None and self.values is not None
        capacity = self.sequences.pool.capacity
        if capacity > self.keys.num_pages:
            with torch.inference_mode(mode=False):
                self.keys = changed(self.keys, lambda t: _grown(t, capacity))
                self.values = changed(self.values, lambda t: _grown(t, capacity))

    def _refine(self, flush: Flush, keys: Tensor) -> None:
        """Write the rests into the last channels of the keys ``[K, N * page_size, D + R]`` that a row packs."""
        assert self.refined_index is not None and isinstance(self.key_codec, KeyCodec)
        pages = keys.unflatten(1, (len(flush.page_ids), -1)).transpose(0, 1)  # [N, K, page_size, D + R]
        if not flush.first:
            exact = pages[:1, ..., : -self.refined.count]
            self.refined_index[flush.row] = self.refined.choose(exact)[0]  # in place: a captured graph reads it
        index = self.refined_index[flush.row].expand(len(flush.page_ids), -1, -1)
        self.refined.write_rests(pages, index, self.key_codec)

    def _store(self, page_ids: list[int], keys: Tensor, values: Tensor) -> None:
        """Quantize ``[K, N * page_size, D]`` into pages."""
        assert self.keys is not None and self.values is not None
        size = self.key_codec.page_size
        ids = torch.tensor(page_ids, dtype=torch.int32, device=keys.device)
        store_pages(self.keys, ids, keys.unflatten(1, (len(page_ids), size)).transpose(0, 1))
        store_pages(self.values, ids, values.unflatten(1, (len(page_ids), size)).transpose(0, 1))

    @torch.inference_mode(mode=False)
    def select_rows(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows: only sinks and window are copied."""
        if self.plain is None:
            return
        index = rows.to(self.plain.keys.device)
        self.plain = PlainTokens(self.plain.keys.index_select(0, index), self.plain.values.index_select(0, index))
        self.refined_index = None if self.refined_index is None else self.refined_index.index_select(0, index)
        self.selector_state.select_rows(index)

    def clear(self) -> None:
        """Drop every tensor."""
        self.keys = self.values = self.plain = self.refined_index = None
        self.selector_state = SelectorState()

    @torch.inference_mode(mode=False)
    def move(self, device: torch.device) -> None:
        """Move every tensor to ``device``."""
        if self.plain is None or self.keys is None or self.values is None:
            return
        self.keys = changed(self.keys, lambda t: t.to(device))
        self.values = changed(self.values, lambda t: t.to(device))
        self.plain = PlainTokens(self.plain.keys.to(device), self.plain.values.to(device))
        self.refined_index = None if self.refined_index is None else self.refined_index.to(device)
        self.selector_state.move(device)

    def tensors(self) -> dict[str, Tensor]:
        """Every persistent tensor by name."""
        if self.plain is None or self.keys is None or self.values is None:
            return {}
        refined = {} if self.refined_index is None else {"refined.index": self.refined_index}
        return {
            **refined,
            **{f"keys.{name}": tensor for name, tensor in self.keys.tensors().items()},
            **{f"values.{name}": tensor for name, tensor in self.values.tensors().items()},
            "plain.keys": self.plain.keys,
            "plain.values": self.plain.values,
        }

    def num_bytes(self) -> LayerBytes:
        """Count the bytes of every persistent tensor, by what they are for."""
        if self.plain is None or self.keys is None or self.values is None:
            return LayerBytes()
        scales = sum(t.nbytes for t in (self.keys.lo, self.keys.step, self.values.lo, self.values.step))
        allocated = max(1, self.keys.num_pages)
        packed = self.keys.codes.nbytes + self.values.codes.nbytes + scales
        column = (self.plain.keys.nbytes + self.plain.values.nbytes) // self.plain.capacity
        sinks = column * min(self.sequences.layout.num_sinks, self.plain.capacity)
        return LayerBytes(
            codes=self.keys.codes.nbytes + self.values.codes.nbytes,
            scales=scales + (0 if self.refined_index is None else self.refined_index.nbytes),
            sinks=sinks,
            window=column * self.plain.capacity - sinks,
            selector=self.selector_state.num_bytes,
            unused=packed - packed * min(self.sequences.pool.num_used, allocated) // allocated,
        )

    def bytes_read(self, scored: Sequence[float], kept: Sequence[float]) -> float:
        """Bytes of pages that a step of one row reads: keys of scored tokens, values of kept ones, once a KV head.

        ``scored`` and ``kept`` are tokens per query head, equal within a KV head.
        """
        if self.plain is None:
            return 0.0
        heads, key_dim = self.plain.keys.shape[1:3]
        per_kv, item = len(scored) // heads, self.plain.keys.element_size()
        key_bytes = token_bytes(self.key_codec, key_dim, item)
        value_bytes = token_bytes(self.value_codec, self.plain.values.shape[-1], item)
        return sum(scored[::per_kv]) * key_bytes + sum(kept[::per_kv]) * value_bytes


def _grown(tensor: Tensor, capacity: int) -> Tensor:
    if tensor.dim() == 1:  # a raw codec has no scales
        return tensor
    out = tensor.new_empty(capacity, *tensor.shape[1:])
    out[: tensor.shape[0]] = tensor
    return out
