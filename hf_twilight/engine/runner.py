"""One forward over the rows of a step: ``[1, T]`` tokens of many requests, each attending to its own pages.

The model is not touched: the step travels as an extra keyword through its layers to the registered attention
function. In each layer all keys and values of the step are written, copied and packed before any row attends.

Every row, of a prompt or of an answer, attends as one decode step at its position does: to the pages that have left
the window by then in packed form, to the rest in the model's dtype, pruned as the settings say. What is computed for
a token therefore depends on the tokens before it and on nothing else; in bfloat16 on matrix tiles also on whether it
came with the prompt, as its sums are then rounded otherwise (see ``tables.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from twilight_cache import PagedStore, PromptTables, RowTables
from twilight_kernels import KeyCodec, ValueCodec, has_prompt_kernels

from ..attention import STEP_ARGUMENT
from ..config import TwilightConfig
from .eligibility import LayerShape, unread_mask
from .plan import StepPlan
from .tables import TableMaker, plain_slot


@dataclass
class Traffic:
    """What attention did, summed over rows, layers and query heads: packed tokens scored, kept, and their mass."""

    scored: float = 0.0
    kept: float = 0.0
    mass: float = 0.0
    rows: int = 0


@dataclass
class Forward:
    """The tensors of one step, handed to the attention of every layer."""

    stores: list[PagedStore]
    slots: Tensor
    offsets: Tensor
    copies: Sequence[tuple[int, int, int]]
    pack_from: Tensor
    pack_to: Tensor
    pack_first: Tensor
    tables: list[RowTables | PromptTables]
    layers_seen: set[int] = field(default_factory=set)

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store the step's keys and values, then attend: ``[1, H, T, D]`` to ``[1, T, H, Dv]``."""
        store = self.stores[layer_idx]
        self.layers_seen.add(layer_idx)
        store.write(self.slots, self.offsets, key[0].transpose(0, 1), value[0].transpose(0, 1))
        if self.copies:
            store.copy(self.copies)
        if self.pack_to.numel():
            store.pack(self.pack_from, self.pack_to, self.pack_first)
        rows = query[0].transpose(0, 1)  # [T, H, D]
        parts = [store.attend(rows[table.first : table.last], table, scaling) for table in self.tables]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)


class Runner:
    """The model and its pages.

    Args:
        model: a decoder whose attention function is ours.
        settings: how pages are packed and read.
        shapes: of the layers.
        plain_pages, packed_pages: slots; ``packed_pages`` is 0 for raw codecs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: TwilightConfig,
        shapes: Sequence[LayerShape],
        plain_pages: int,
        packed_pages: int,
    ) -> None:
        self.model: Any = model
        self.settings = settings
        self.device = model.device
        self.num_heads = shapes[0].num_heads
        self.traffic = Traffic()
        self.stores = [
            PagedStore(
                *layer_codecs(settings, shapes, layer), settings.policy(layer),
                settings.refined(layer, shape.kv_heads, shape.key_dim),
                num_sinks=settings.num_sinks, plain_pages=plain_pages, packed_pages=packed_pages,
                kv_heads=shape.kv_heads, key_dim=shape.key_dim, value_dim=shape.value_dim, dtype=model.dtype,
                device=self.device,
            )
            for layer, shape in enumerate(shapes)
        ]  # fmt: skip
        self.is_raw = not packed_pages
        self._tables = TableMaker(
            settings.layout, self.num_heads, self.is_raw, has_prompt_kernels(self.device, model.dtype), self.device
        )
        self._mask = unread_mask(model)

    def run(self, plan: StepPlan) -> Tensor:
        """Compute a step; return float32 logits ``[S, V]`` of the segments whose next token can be sampled."""
        forward = self._forward(plan)
        tokens = [token for s in plan.segments for token in s.request.tokens[s.start : s.end]]
        positions = np.concatenate([np.arange(s.start, s.end) for s in plan.segments])
        ends = np.cumsum([s.end - s.start for s in plan.segments]) - 1
        sampled = [int(end) for end, s in zip(ends, plan.segments, strict=True) if s.is_last]
        arguments = {STEP_ARGUMENT: forward, "logits_to_keep": self._on_device(np.asarray(sampled or [0], np.int64))}
        out = self.model(
            input_ids=self._on_device(np.asarray([tokens], np.int64)),
            position_ids=self._on_device(positions[None]),
            attention_mask=self._mask,
            use_cache=False,
            **arguments,
        )
        if len(forward.layers_seen) != len(self.stores):
            raise RuntimeError(f"{len(forward.layers_seen)} of {len(self.stores)} layers used the attention function")
        self._count(forward.tables)
        logits: Tensor = out.logits[0, : len(sampled)].float()
        return logits

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _forward(self, plan: StepPlan) -> Forward:
        size, sinks = self.settings.page_size, self.settings.num_sinks
        slots, offsets = [], []
        for segment in plan.segments:
            at = np.arange(segment.start, segment.end)
            page = np.where(at < sinks, 0, (at - sinks) // size + (sinks > 0))
            first = int(page[0])
            plain = [plain_slot(held) for held in segment.request.pages[first : int(page[-1]) + 1]]
            slots.append(np.asarray(plain, np.int64)[page - first])
            offsets.append(np.where(at < sinks, at, (at - sinks) % size))
        packs = np.asarray([(page.plain, page.packed, first) for page, first in plan.packs], np.int32).reshape(-1, 3)
        return Forward(
            self.stores,
            self._on_device(np.concatenate(slots)),
            self._on_device(np.concatenate(offsets)),
            plan.copies,
            self._on_device(packs[:, 0].astype(np.int64)),
            self._on_device(np.ascontiguousarray(packs[:, 1])),
            self._on_device(packs[:, 2].astype(np.int64)),
            self._tables.make(plan.segments),
        )

    def _count(self, tables: list[RowTables | PromptTables]) -> None:
        for table in tables:
            scored, _, kept, mass, _ = table.stats.sum((0, 1)).tolist()
            self.traffic.scored += scored
            self.traffic.kept += kept
            self.traffic.mass += mass
            self.traffic.rows += table.last - table.first


def layer_codecs(settings: TwilightConfig, shapes: Sequence[LayerShape], layer: int) -> tuple[KeyCodec, ValueCodec]:
    """The codecs of a layer; raw ones where its heads do not pack into whole bytes."""
    key_codec, value_codec = settings.codecs(layer)
    return key_codec.for_heads(shapes[layer].key_dim), value_codec.for_heads(shapes[layer].value_dim)
