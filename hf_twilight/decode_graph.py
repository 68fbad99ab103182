"""Decode steps from static buffers: on CUDA a step of the whole model is one launch of a captured graph.

The model is called as the engine calls it: without a cache, the step travelling to the attention function. Tokens,
positions, lengths and block tables are copied into tensors that stay where they are; keys, values and the sums of the
statistics are the cache's own. So a step computes what a plain one does, to the bit, and either may follow the other.

A graph is captured at the second of two steps that run from the same tensors, the first of which compiled and warmed
everything. Pages are packed between steps, as ever; where the page tensors grow or rows change, the graph is captured
anew.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twilight_cache import LayerStore, Step
from twilight_cache.selectors import Full
from twilight_kernels import has_kernels

from .attention import ATTENTION_NAME, STEP_ARGUMENT

if TYPE_CHECKING:
    from .cache import TwilightCache

logger = logging.getLogger(__name__)

DEVICES = ("cuda",)  # where `generate` takes graphs
_SPARE_PAGES = 16  # of a row: the table, and the page tensors, last as long
_TAKES_STEPS = "_twilight_takes_steps"

Replay = Callable[[], None]


@dataclasses.dataclass
class _StaticStep:
    """What attention gets: the layers' stores, and a step whose tables are static buffers."""

    stores: list[LayerStore]
    step: Step

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attend a layer's ``query [B, H, 1, D]``, its ``key``, ``value [B, K, 1, D]`` taken in: ``[B, 1, H, Dv]``."""
        out = self.stores[layer_idx].attend(query[:, :, 0], scaling, self.step, key[:, :, 0], value[:, :, 0])
        return out[:, None]


class DecodeGraph:
    """The decode steps of one cache.

    Args:
        model: a decoder whose attention function is ours.
        cache: what it decodes from; its ``refusal`` must be None.

    Attributes:
        captures: graphs captured so far.
        reason: why none can be, None as long as nobody knows one.
    """

    def __init__(self, model: Any, cache: TwilightCache) -> None:
        from .engine.eligibility import unread_mask

        self.captures = 0
        self.reason: str | None = None
        self._model, self._mask = model, unread_mask(model)
        self._owner = weakref.ref(cache)  # which owns us: memory of the GPU must not wait for the cycle to be found
        self._capture = _capture if model.device.type == "cuda" else None
        self._logits = torch.zeros(0)
        self._batch = 0
        self._static: _StaticStep | None = None
        self._replay: Replay | None = None
        self._held: list[weakref.ref[Tensor]] = []
        self._is_warm = False

    def serves(self, model: Any) -> bool:
        """Whether steps of ``model`` can be taken from here: it is the same, where it was, with our attention."""
        is_same = model is self._model and model.device == self._mask.device and not model.training
        return is_same and model.config.get_text_config(decoder=True)._attn_implementation == ATTENTION_NAME

    def step(self, token_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Take one token of each row into the cache and return the logits of the next.

        Args:
            token_ids: ``[B, 1]`` int64; the cache must hold B rows.
            position_ids: ``[B, 1]`` int64; None where no row is padded: the tokens that the cache holds.
        Returns:
            ``[B, V]`` in the model's dtype, the caller's to keep.
        Raises:
            ValueError: an empty cache, or another batch than it holds.
            MemoryError: the page pool has no pages left; nothing is taken then.
        """
        cache = self._owner()
        assert cache is not None
        cache.commit()
        layers = cache.twilight_layers
        stores = [layer.store for layer in layers if layer.store is not None]
        if not stores:
            raise ValueError("the cache must hold a prompt to decode from, got an empty one; run the model on it first")
        step = cache.sequences.begin(cache.sequences.tokens, 1, token_ids.shape[0])
        if not self._fits(stores, step):
            cache.sequences.pool.reserve(_SPARE_PAGES * len(step.pages))
            self._allocate(stores, step)
            self._forget()
        for store in stores:
            store.make_room(step)
        if self._replay is not None and self._has_moved(stores):
            self._forget()
        self._load(step, token_ids, position_ids)
        logits = self._run(stores)
        for layer, store in zip(layers, stores, strict=True):
            layer.tokens = store.tokens = step.start + 1
            store.flush(step.flushes)
        return logits

    def _run(self, stores: list[LayerStore]) -> Tensor:
        if self._replay is None and self._is_warm and self._capture is not None and self.reason is None:
            self._try_capture(stores)
        if self._replay is None:
            self._is_warm = True
            return self._forward()
        self._replay()
        for store in stores:
            store.decodes.count_whole(1)
        return self._logits.clone()

    def _try_capture(self, stores: list[LayerStore]) -> None:
        assert self._capture is not None
        before = [store.decodes.steps for store in stores]
        try:
            self._replay, self._logits = self._capture(self._forward)
        except RuntimeError as error:  # what waits for the host cannot be captured, as RoPE that looks at positions
            self.reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.info("twilight: decode steps are launched one by one: %s", self.reason)
        else:
            self.captures += 1
            self._held = [weakref.ref(tensor) for tensor in _owned(stores)]
        for store, steps in zip(stores, before, strict=True):
            store.decodes.count_whole(steps - store.decodes.steps)  # capturing computes nothing

    def _forward(self) -> Tensor:
        out = self._model(
            input_ids=self._ids, position_ids=self._positions, attention_mask=self._mask, use_cache=False,
            **{STEP_ARGUMENT: self._static},
        )  # fmt: skip
        logits: Tensor = out.logits[:, -1]
        return logits

    def _fits(self, stores: list[LayerStore], step: Step) -> bool:
        """Whether the buffers are of these stores, this batch and at least so many pages."""
        if self._static is None or self._static.stores != stores or len(step.pages) != self._batch:
            return False
        return step.most_pages <= self._table.shape[1]

    def _has_moved(self, stores: list[LayerStore]) -> bool:
        """Whether a tensor that the graph knows by its place is another one now."""
        owned = _owned(stores)
        return len(owned) != len(self._held) or any(
            ref() is not tensor for ref, tensor in zip(self._held, owned, strict=True)
        )

    def _forget(self) -> None:
        """Drop the graph; the next step warms up for another one."""
        self._replay, self._held, self._is_warm = None, [], False
        self._logits = torch.zeros(0)  # it holds the graph's memory

    @torch.inference_mode(mode=False)  # a tensor made in that mode could not be written to outside of it
    def _allocate(self, stores: list[LayerStore], step: Step) -> None:
        device, self._batch = self._mask.device, len(step.pages)
        self._ids = torch.zeros(self._batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._ids)
        self._lengths = torch.zeros(2, self._batch, dtype=torch.int32, device=device)
        self._table_cpu: NDArray[np.int32] = np.full((self._batch, step.most_pages + _SPARE_PAGES), -1, np.int32)
        self._table = torch.from_numpy(self._table_cpu).to(device, copy=True)
        fixed = dataclasses.replace(
            step, num_pages=self._lengths[0], plain_len=self._lengths[1], block_table=self._table, _placed=None
        )
        self._static = _StaticStep(stores, fixed)

    def _load(self, step: Step, token_ids: Tensor, position_ids: Tensor | None) -> None:
        """Copy a step into the buffers; none of the copies waits for the device."""
        self._ids.copy_(token_ids)
        if position_ids is None:
            self._positions.fill_(step.start)
        else:
            self._positions.copy_(position_ids)
        self._lengths.copy_(torch.stack((step.num_pages, step.plain_len)), non_blocking=True)
        known, table = self._table_cpu[:, : step.most_pages], step.block_table.numpy()
        if not np.array_equal(known, table):
            known[:] = table
            self._table.copy_(torch.from_numpy(self._table_cpu), non_blocking=True)


def refusal(model: Any, cache: TwilightCache) -> str | None:
    """Why the decode steps of ``cache`` cannot run from static buffers, None if they can."""
    settings, layers = cache.settings, cache.twilight_layers
    if model.device.type not in DEVICES:
        return f"the model is on {model.device.type}"
    if len(layers) != len(cache.layers) or not layers:
        return "not every layer is packed"
    if cache.model_config._attn_implementation != ATTENTION_NAME:
        return "the model does not take our attention function"
    if settings.is_exact or settings.skvq_tables is not None or not has_kernels(model.device, model.dtype):
        return "decode does not run in our kernels"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model lies on several devices"
    if any(type(settings.policy(layer.layer_idx).selector) is not Full for layer in layers):
        return f"the selector {settings.selector!r} may wait for the device"
    if not hasattr(model, _TAKES_STEPS):
        from .engine.eligibility import layer_shapes

        try:
            with torch.no_grad():
                layer_shapes(model)
        except ValueError as error:
            setattr(model, _TAKES_STEPS, str(error))
        else:
            setattr(model, _TAKES_STEPS, None)
    reason: str | None = getattr(model, _TAKES_STEPS)
    return reason


def _capture(forward: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Capture ``forward``; return what replays it, and the tensor it writes to."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
        logits = forward()
    return graph.replay, logits


def _owned(stores: list[LayerStore]) -> list[Tensor]:
    """The tensors that a graph knows by their place."""
    found: list[Tensor] = []
    for store in stores:
        assert store.keys is not None and store.values is not None and store.plain is not None
        found += [store.keys.codes, store.values.codes, store.plain.keys]  # the others change with them
        found += [] if store.decodes.sums is None else [store.decodes.sums]
    return found
