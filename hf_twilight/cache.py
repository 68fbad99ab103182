"""``TwilightCache``: packed pages behind the ``Cache`` contract of Transformers 5.17 to 5.23."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from twilight_cache import LayerBytes, LayerStore, PagePool, SequenceBatch, Step
from twilight_kernels import KeyCodec, ValueCodec, backend_name

from .attention import ATTENTION_NAME, Handle, pin
from .config import TwilightConfig, as_config
from .prefill import SparsePrefill
from .signature import require_fit
from .skvq_tables import read_tables

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = torch.finfo(torch.float16).max  # of the scales that pages are packed with


class TwilightLayer(CacheLayerMixin):
    """One full-attention layer: packed pages, sinks and window.

    ``update`` hands the attention function a handle to this layer. Until that function has seen the very tensors
    that ``update`` returned (so that no model code stands between), they are real; afterwards, decode gets a
    stand-in of the right shape filled with NaN, and nothing is ever dequantized.

    Args:
        layer_idx: place in the model.
        sequences: rows shared by the layers of the cache.
        settings: how tokens are stored and attended to.
        model_config: says whether the model's attention is ours at this moment.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = True

    def __init__(
        self,
        layer_idx: int,
        sequences: SequenceBatch,
        settings: TwilightConfig,
        model_config: PreTrainedConfig,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer_idx, self.settings, self.model_config = layer_idx, settings, model_config
        self.sequences = sequences
        self.store: LayerStore | None = None
        self.prefill = SparsePrefill(settings, layer_idx)
        self.tokens = 0  # logical tokens, those of an unclaimed update included
        self.is_untouched = False
        self._pending: tuple[Tensor, Tensor, int] | None = None
        self._nan: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn shape, dtype and device from the first tensors, ``[B, K, T, D]`` with T possibly 0."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.num_heads, self.key_dim, self.value_dim = (
            key_states.shape[1],
            key_states.shape[-1],
            value_states.shape[-1],
        )
        key_codec, value_codec = wanted = self.settings.codecs(self.layer_idx)
        if self.key_dim % 8:
            key_codec = KeyCodec(16, key_codec.page_size)
        if self.value_dim % 8:
            value_codec = ValueCodec(16, value_codec.page_size)
        if (key_codec, value_codec) != wanted:
            logger.info("layer %d keeps raw pages: head_dim %d does not pack", self.layer_idx, self.key_dim)
        policy, tables = self.settings.policy(self.layer_idx), self.settings.skvq_tables
        if tables is None:
            self.store = LayerStore(self.sequences, key_codec, value_codec, policy)
        else:
            by_skvq = read_tables(tables, self.layer_idx, self.settings.page_size)
            self.store = LayerStore(self.sequences, *by_skvq, policy)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens ``[B, K, T, D]``; return what the attention function is to be called with.

        Raises:
            ValueError: another batch size, shape, dtype or device than the cache was filled with, or numbers that
                cannot be packed; nothing is written then.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        self.commit(None)
        start = self.tokens
        self._pending = (key_states, value_states, start)
        self.tokens += key_states.shape[-2]
        if getattr(self.model_config, "_attn_implementation", None) != ATTENTION_NAME:
            full = self.full() if start else (key_states, value_states)
            self.commit(None)
            return full
        if start and self.is_untouched:
            return self._stand_ins(key_states, value_states)
        keys, values = self.full() if start else (key_states, value_states)
        handle = Handle(self, is_stand_in=False)
        return pin(keys, handle), pin(values, handle)

    def can_decode(self, padding: Sequence[int]) -> bool:
        """Whether one query token a row, in rows padded like this, can be answered from pages."""
        if self._pending is None or self.settings.is_exact or self.dtype not in _KERNEL_DTYPES:
            return False
        if backend_name(self.device) == "reference" or self.store is None or not self.store.has_kernels:
            return False
        start = self._pending[2]
        return self.sequences.accepts_padding(padding, start) and max(padding) <= start

    def decode(self, query: Tensor, scaling: float, padding: Sequence[int]) -> Tensor:
        """Take the pending token of each row and attend: ``[B, H, D]`` to ``[B, H, Dv]``."""
        assert self._pending is not None and self.store is not None
        keys, values, step = self._begin(padding)
        return self.store.decode(step, query, keys, values, scaling)

    def commit(self, padding: Sequence[int] | None) -> None:
        """Store the pending tokens; ``padding`` is what the mask says of each row, None if nobody knows."""
        if self._pending is None or self.store is None:
            return
        if padding is not None and not self.sequences.accepts_padding(padding, self._pending[2]):
            padding = None
        keys, values, step = self._begin(padding)
        self.store.append(step, keys, values)

    def observe(self, queries: Tensor, scaling: float) -> None:
        """Show the selector the queries ``[B, H, T, D]`` of the tokens that were stored last."""
        if self.store is not None and backend_name(self.device) != "reference":
            self.store.observe(queries, scaling)

    def full(self) -> tuple[Tensor, Tensor]:
        """All keys and values, ``[B, K, S, D]`` in the model's dtype: packed ones dequantized, padding zero."""
        assert self.store is not None
        if self._pending is None:
            return self.store.read()
        keys, values, start = self._pending
        if not start:
            return keys, values
        past_keys, past_values = self.store.read()
        return torch.cat([past_keys, keys], -2), torch.cat([past_values, values], -2)

    def get_seq_length(self) -> int:
        """Logical tokens seen, padding included, whatever attention reads of them."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask must cover."""
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows of the cache; -1 before the first update."""
        if self._pending is not None:
            return self._pending[0].shape[0]
        return self.sequences.batch_size or -1

    def clear(self) -> None:
        """Drop everything."""
        self.store, self._pending, self.tokens = None, None, 0
        self.prefill.clear()
        self.is_initialized = self.is_untouched = False

    def reset(self) -> None:
        """Drop everything; the cache that owns this layer clears the shared block tables."""
        self.clear()

    def offload(self) -> None:
        """Move every tensor to the CPU."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move every tensor back to the layer's device."""
        if self.is_initialized:
            self._move(self.device)

    def _begin(self, padding: Sequence[int] | None) -> tuple[Tensor, Tensor, Step]:
        """Count the pending tokens in; a step that the page pool refuses leaves the layer as it was."""
        assert self._pending is not None
        keys, values, start = self._pending
        self._pending = None
        try:
            step = self.sequences.begin(start, keys.shape[-2], keys.shape[0], padding)
        except MemoryError:
            self.tokens = start
            raise
        return keys.detach(), values.detach(), step

    def _move(self, device: torch.device) -> None:
        self.commit(None)
        if self.store is not None:
            self.store.move(device)

    def _stand_ins(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """NaNs of the full logical shape that take no memory: code that reads them cannot go unnoticed."""
        if self._nan is None:
            self._nan = torch.full((1, 1, 1, 1), torch.nan, dtype=self.dtype, device=self.device)
        handle = Handle(self, is_stand_in=True)
        rows, heads, _, key_dim = keys.shape
        key = pin(self._nan.expand(rows, heads, self.tokens, key_dim), handle)
        if values.shape[-1] == key_dim:
            return key, key
        return key, pin(self._nan.expand(rows, heads, self.tokens, values.shape[-1]), handle)

    def _check(self, keys: Tensor, values: Tensor) -> None:
        """Raise ValueError unless the tensors continue what is stored and can be packed."""
        stored = (self.num_heads, self.key_dim, self.value_dim, self.dtype, self.device)
        given = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device)
        if stored != given:
            names = ("KV heads", "key dim", "value dim", "dtype", "device")
            told = ", ".join(f"{n} {a} and got {b}" for n, a, b in zip(names, stored, given, strict=True) if a != b)
            raise ValueError(
                f"layer {self.layer_idx} of this cache was filled with {told}; "
                "use a new TwilightCache for another model, dtype or device"
            )
        rows = self.sequences.batch_size
        if rows and keys.shape[0] != rows:
            raise ValueError(
                f"this cache holds {rows} sequences, got a batch of {keys.shape[0]}; use a new cache, or change its "
                "rows with batch_select_indices or batch_repeat_interleave"
            )
        if keys.shape[2] > 1:  # a single token is looked at when its page is packed
            key_codec, value_codec = self.settings.codecs(self.layer_idx)
            self._check_range("keys", keys, key_codec)
            self._check_range("values", values, value_codec)

    def _check_range(self, name: str, tensor: Tensor, codec: KeyCodec | ValueCodec) -> None:
        largest = 0.0 if codec.is_raw else tensor.detach().abs().max().item()
        if not largest <= _LARGEST:
            raise ValueError(
                f"{name} must be finite and at most {_LARGEST:g} to be packed, got {largest} in layer "
                f"{self.layer_idx}; check the model's dtype for overflow, or use the preset 'exact'"
            )


class TwilightCache(DynamicCache):
    """A ``Cache`` that packs full-attention layers at a few bits a number and keeps all others as they are.

    Args:
        config: the model's config; decoder-only models.
        settings: a ``TwilightConfig``, a dict of settings, a preset's name, or None for ``balanced``.
        preset: a preset's name, instead of ``settings``.
        max_pages: most pages in use at a time; None for as many as memory holds.
        changes: single settings on top, as ``p=0.9``.
    Raises:
        ValueError: an encoder-decoder model, or settings that do not exist.
        TypeError: ``config`` is no model config.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        settings: TwilightConfig | dict[str, Any] | str | None = None,
        *,
        preset: str | None = None,
        max_pages: int | None = None,
        **changes: Any,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be a model's config, got {type(config).__name__}; pass model.config")
        if config.is_encoder_decoder:
            raise ValueError(
                f"TwilightCache takes decoder-only models, got encoder-decoder {config.model_type!r}; "
                "leave cache_implementation unset for it"
            )
        if preset is not None and settings is not None:
            raise ValueError("give settings or preset, not both")
        decoder = config.get_text_config(decoder=True)
        super().__init__(config=decoder)
        self.settings = as_config(settings if preset is None else preset, **changes)
        require_fit(self.settings, decoder, len(self.layers))
        self.model_config = decoder
        self.token_ids: Tensor | None = None  # what the cache was saved with
        self.sequences = SequenceBatch(self.settings.layout, PagePool(max_pages))
        stock = Counter(_reason(layer) for layer in self.layers if type(layer) is not DynamicLayer)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = TwilightLayer(index, self.sequences, self.settings, decoder)
        reasons = f"; {len(self.settings.layers)} layers differ" if self.settings.layers else ""
        reasons += "".join(f"; {count} {reason}" for reason, count in stock.items())
        logger.info(
            "twilight: %d of %d layers packed (%d-bit keys, %d-bit values)%s",
            len(self.twilight_layers), len(self.layers), self.settings.key_bits, self.settings.value_bits, reasons,
        )  # fmt: skip

    @property
    def twilight_layers(self) -> list[TwilightLayer]:
        """The layers whose storage is ours."""
        return [layer for layer in self.layers if isinstance(layer, TwilightLayer)]

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens back from every sequence; 0 settles a draft.

        Raises:
            ValueError: a positive number.
        """
        count = -int(tokens_to_remove)
        if count < 0:
            raise ValueError(
                f"tokens_to_remove must be 0 or negative, got {-count}; pass -n to remove the last n tokens"
            )
        self.commit()
        for layer in self._stock_layers():
            if layer.is_initialized:
                layer.crop(-count)
        stores = self._stores()
        if count and stores:
            cuts = self.sequences.crop(count)
            for layer in self.twilight_layers:
                layer.tokens = self.sequences.tokens
                if layer.store is not None:
                    layer.store.crop(cuts)
        if self.sequences.is_recording and stores:
            flushes = self.sequences.settle()
            for store in stores:
                store.flush(flushes)

    def activate_past_recording(self) -> None:
        """Let drafts be taken back exactly: packing waits until ``crop`` has settled them."""
        super().activate_past_recording()  # type: ignore[no-untyped-call]
        self.sequences.is_recording = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search; pages are shared, only sinks and windows are copied."""
        self._select_rows(beam_idx, lambda layer: layer.reorder_cache(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times; the copies share their pages."""
        self.commit()
        rows = torch.arange(self.sequences.batch_size).repeat_interleave(repeats)
        self._select_rows(rows, lambda layer: layer.batch_repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (numbers, or a bool per row)."""
        self.commit()
        rows = torch.arange(self.sequences.batch_size)[indices.cpu()] if self.sequences.batch_size else indices
        self._select_rows(rows, lambda layer: layer.batch_select_indices(indices))

    def reset(self) -> None:
        """Drop all tokens, pages and statistics."""
        super().reset()  # type: ignore[no-untyped-call]
        self.sequences.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> TwilightCache:
        """Copy the content; the model's config stays the model's, since it says which attention is in use."""
        self.commit()
        memo[id(self.model_config)] = self.model_config
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Yield dequantized ``(keys, values, sliding window)`` of each layer."""
        layers: list[Any] = self.layers
        for layer in layers:
            if isinstance(layer, TwilightLayer):
                keys, values = layer.full() if layer.is_initialized else (None, None)
                yield keys, values, None
            else:
                yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    def memory(self) -> LayerBytes:
        """Bytes of the packed layers' persistent tensors, by what they are for."""
        self.commit()
        total = LayerBytes()
        for store in self._stores():
            total += store.num_bytes()
        return total

    @property
    def nbytes(self) -> int:
        """Bytes of all persistent tensors: packed layers, block tables, and the layers that are stock."""
        stock = sum(_stock_bytes(layer) for layer in self._stock_layers())
        return self.memory().total + self.sequences.table.nbytes + stock

    def stats(self) -> list[dict[str, Any]]:
        """What decode steps did, averaged over steps and rows since the cache was made or reset.

        Returns:
            One dict for each packed layer that decoded: ``layer``, ``steps``, and per query head ``candidates``
            (packed tokens that the selector let through), ``scored`` (packed tokens of the pages that hold one),
            ``needed`` (packed tokens the head itself keeps), ``kept`` (packed tokens attended, the union over the
            query heads of its KV head), ``mass`` (share attended of the attention mass of candidates, sinks and
            window) and ``coverage`` (share of the *whole* mass that these carry, as far as it is known: 1 where
            every token is a candidate; the selector's own estimate for ``tactic``, ``double_sparse`` and ``quest``
            without a budget; None for selectors that do not know, and then nothing is known of the whole mass).
            The share of the whole mass attended is ``coverage * mass``. ``bytes_read`` is what one step of one row
            reads from pages to score and attend; what the selector reads to choose is not in it.
        """
        found = []
        for layer in self.twilight_layers:
            store = layer.store
            if store is None or store.stats is None or not store.num_decodes:
                continue
            mean = (store.stats.sum(0) / (store.num_decodes * store.stats.shape[0])).tolist()
            scored, needed, kept, mass, candidates = ([row[i] for row in mean] for i in range(5))
            found.append({
                "layer": layer.layer_idx, "steps": store.num_decodes, "candidates": candidates, "scored": scored,
                "needed": needed, "kept": kept, "mass": mass, "coverage": store.mean_coverage(),
                "bytes_read": store.bytes_read(scored, kept),
            })  # fmt: skip
        return found

    def prefill_stats(self) -> list[dict[str, Any]]:
        """What sparse prefill did since the cache was made or reset.

        Returns:
            One dict for each packed layer that prefilled sparsely: ``layer`` and what ``SparsePrefill.stats`` tells
            (``density``, ``stripes``, ``mass``, ``mass_q05``).
        """
        found = [(layer.layer_idx, layer.prefill.stats()) for layer in self.twilight_layers]
        return [{"layer": index, **stats} for index, stats in found if stats is not None]

    def save(self, path: str | Path, *, tokens: Tensor | None = None) -> None:
        """Write the cache to a safetensors file; see ``hf_twilight.storage.save_cache``."""
        from .storage import save_cache

        save_cache(self, path, tokens=tokens)

    @staticmethod
    def load(path: str | Path, config: PreTrainedConfig | None = None) -> TwilightCache:
        """Read a cache that ``save`` wrote; see ``hf_twilight.storage.load_cache``."""
        from .storage import load_cache

        return load_cache(path, config)

    def _select_rows(self, rows: Tensor, on_stock: Callable[[Any], None]) -> None:
        self.commit()
        for layer in self._stock_layers():
            on_stock(layer)
        if self.sequences.batch_size:
            self.sequences.select_rows(rows.tolist())
            for store in self._stores():
                store.select_rows(rows)

    def commit(self) -> None:
        """Store what `update` was given and no attention function claimed; every reader below does so itself."""
        for layer in self.twilight_layers:
            layer.commit(None)

    def _stores(self) -> list[LayerStore]:
        return [layer.store for layer in self.twilight_layers if layer.store is not None]

    def _stock_layers(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, TwilightLayer)]


def _reason(layer: Any) -> str:
    name = type(layer).__name__
    if getattr(layer, "is_sliding", False):
        return "stay stock: sliding window"
    return f"stay stock: {name}"


def _stock_bytes(layer: Any) -> int:
    tensors = (value for value in vars(layer).values() if isinstance(value, Tensor))
    return sum(tensor.nbytes for tensor in tensors)
