"""``TwilightCache``: packed pages behind the ``Cache`` contract of Transformers 5.17 to 5.23."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from twilight_cache import LayerBytes, LayerStore, PagePool, SequenceBatch

from .config import TwilightConfig, as_config
from .layer import TwilightLayer
from .signature import require_fit

if TYPE_CHECKING:
    from pathlib import Path

    from .decode_graph import DecodeGraph

logger = logging.getLogger(__name__)


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
        self.graph: DecodeGraph | None = None  # what generate decodes with on GPUs, see decode_call.py
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

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new tokens, see ``TwilightLayer.update``; once one has stored a prompt, make room in all.

        That is only done on CPUs: what it spares is memory that their allocator does not find again.
        """
        layer = self.layers[layer_idx]
        is_next = isinstance(layer, TwilightLayer) and not layer.is_initialized and layer.room is None
        if is_next and key_states.shape[0] == self.sequences.batch_size and key_states.device.type == "cpu":
            for other in self.twilight_layers:
                other.make_room(key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may ask for a compiled call: it gets the steps of ``graph``, see ``decode_call.py``."""
        return self.graph is not None

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
        vars(twin).update(copy.deepcopy({**vars(self), "graph": None}, memo))
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
            means = None if layer.store is None else layer.store.decodes.means()
            if layer.store is None or means is None:
                continue
            found.append({
                "layer": layer.layer_idx, "steps": layer.store.decodes.steps, **means,
                "coverage": layer.store.decodes.mean_coverage(),
                "bytes_read": layer.store.bytes_read(means["scored"], means["kept"]),
            })  # fmt: skip
        return found

    def prefill_stats(self) -> list[dict[str, Any]]:
        """What sparse prefill did since the cache was made or reset.

        Returns:
            One dict for each packed layer that prefilled sparsely: ``layer`` and what ``SparsePrefill.stats`` tells
            (``density``, ``stripes``, ``mass``, ``mass_q05``, ``retrieving``, ``dense``).
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
