"""``TwilightLayer``: one packed layer behind the cache-layer contract of Transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from twilight_cache import LayerStore, SequenceBatch, Step
from twilight_kernels import has_kernels, largest_magnitudes

from .attention import ATTENTION_NAME, Handle, pin
from .config import TwilightConfig
from .prefill import SparsePrefill
from .skvq_tables import read_tables

logger = logging.getLogger(__name__)

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
        # asked for here, all layers in a row: in the middle of a forward, each would run on cold caches
        self._policy, self._codecs = settings.policy(layer_idx), settings.codecs(layer_idx)
        self.store: LayerStore | None = None
        self.room: tuple[tuple[Any, ...], LayerStore] | None = None  # what ``make_room`` made, and for what form
        self.prefill = SparsePrefill(settings, layer_idx)
        self.tokens = 0  # logical tokens, those of an unclaimed update included
        self.is_untouched = False
        self._pending: tuple[Tensor, Tensor, int] | None = None
        self._nan: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn shape, dtype and device from the first tensors, ``[B, K, T, D]`` with T possibly 0."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.has_kernels = has_kernels(self.device, self.dtype)
        self.num_heads, self.key_dim, self.value_dim = (
            key_states.shape[1],
            key_states.shape[-1],
            value_states.shape[-1],
        )
        if self.room is not None and self.room[0] == _form(key_states, value_states):
            self.store = self.room[1]
        else:
            self.store = self._new_store(key_states, value_states)
        self.room, self.is_initialized = None, True

    def make_room(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the tensors for the prompt that another layer has just stored: ``[B, K, T, D]``, if shapes are alike.

        All layers' together, before the rest of a forward: a tensor that stays, made among the temporaries of a layer,
        keeps the allocator from using the hole again that these leave, and each layer adds such a hole.
        """
        rows, heads, tokens, _ = key_states.shape
        if self.is_initialized or self.settings.skvq_tables is not None or tokens != self.sequences.tokens:
            return
        try:
            store = self._new_store(key_states, value_states)
        except ValueError:
            return  # calibrated for other heads
        store.make_room(self.sequences.begin(0, tokens, rows), key_states, value_states)
        self.room = _form(key_states, value_states), store
        self.prefill.make_room(rows, heads, tokens)

    def _new_store(self, key_states: Tensor, value_states: Tensor) -> LayerStore:
        tables, heads, key_dim = self.settings.skvq_tables, key_states.shape[1], key_states.shape[-1]
        if tables is not None:
            by_skvq = read_tables(tables, self.layer_idx, self.settings.page_size)
            return LayerStore(self.sequences, *by_skvq, self._policy)
        codecs = self._codecs[0].for_heads(key_dim), self._codecs[1].for_heads(value_states.shape[-1])
        if codecs != self._codecs:
            logger.info("layer %d keeps raw pages: head_dim %d does not pack", self.layer_idx, key_dim)
        refined = self.settings.refined(self.layer_idx, heads, key_dim)
        return LayerStore(self.sequences, *codecs, self._policy, refined)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens ``[B, K, T, D]``; return what the attention function is to be called with.

        Raises:
            ValueError: another batch size, shape, dtype or device than the cache was filled with, or numbers that
                cannot be packed; nothing is written then.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        if self._pending is not None:
            self.commit(None)
        start = self.tokens
        self._pending = (key_states, value_states, start)
        self.tokens += key_states.shape[-2]
        if _attention_of(self.model_config) != ATTENTION_NAME:
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
        if self._pending is None or self.settings.is_exact or not self.has_kernels:
            return False
        if self.store is None or not self.store.has_kernels:
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
        if self.store is not None and self.has_kernels:
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
        self.store, self.room, self._pending, self.tokens = None, None, None, 0
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
        if keys.requires_grad or values.requires_grad:
            keys, values = keys.detach(), values.detach()
        return keys, values, step

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
        batch, heads, count, key_dim = keys.shape
        stored = (self.num_heads, self.key_dim, self.value_dim, self.dtype, self.device)
        given = (heads, key_dim, values.shape[3], keys.dtype, keys.device)
        if stored != given:
            names = ("KV heads", "key dim", "value dim", "dtype", "device")
            told = ", ".join(f"{n} {a} and got {b}" for n, a, b in zip(names, stored, given, strict=True) if a != b)
            raise ValueError(
                f"layer {self.layer_idx} of this cache was filled with {told}; "
                "use a new TwilightCache for another model, dtype or device"
            )
        rows = self.sequences.batch_size
        if rows and batch != rows:
            raise ValueError(
                f"this cache holds {rows} sequences, got a batch of {batch}; use a new cache, or change its "
                "rows with batch_select_indices or batch_repeat_interleave"
            )
        if count > 1:  # a single token is looked at when its page is packed
            self._check_range(keys, values)

    def _check_range(self, keys: Tensor, values: Tensor) -> None:
        assert self.store is not None
        codecs = self.store.key_codec, self.store.value_codec
        if codecs[0].is_raw and codecs[1].is_raw:
            return
        found = zip(("keys", "values"), largest_magnitudes(keys.detach(), values.detach()), codecs, strict=True)
        for name, largest, codec in found:
            if not codec.is_raw and not largest <= _LARGEST:
                raise ValueError(
                    f"{name} must be finite and at most {_LARGEST:g} to be packed, got {largest} in layer "
                    f"{self.layer_idx}; check the model's dtype for overflow, or use the preset 'exact'"
                )


def _form(keys: Tensor, values: Tensor) -> tuple[Any, ...]:
    return (*keys.shape[:2], keys.shape[3], values.shape[3], keys.dtype, keys.device)


def _attention_of(config: PreTrainedConfig) -> str | None:
    """Return ``config._attn_implementation``, past the Python code that a config runs for each attribute."""
    name = object.__getattribute__(config, "__dict__").get("_attn_implementation_internal", ...)
    found: str | None = getattr(config, "_attn_implementation", None) if name is ... else name
    return found
