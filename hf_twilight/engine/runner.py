"""One forward over the rows of a step: ``[1, T]`` tokens of many requests, each attending to its own pages.

The model is not touched: the step travels as an extra keyword through its layers to the registered attention
function. In each layer all keys and values of the step are written, copied and packed before any row attends.

Every row, of a prompt or of an answer, attends as one decode step at its position does: to the pages that have left
the window by then in packed form, to the rest in the model's dtype, pruned as the settings say. What is computed for
a token therefore depends on the tokens before it and on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from twilight_cache import PagedStore, RowTables, TreePage
from twilight_kernels import KeyCodec, ValueCodec

from ..attention import STEP_ARGUMENT
from ..config import TwilightConfig
from .eligibility import LayerShape, unread_mask
from .plan import Segment, StepPlan

_LOGITS_BYTES = 1 << 23  # of scores that one attention call keeps: what fits the caches


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
    tables: list[RowTables]
    layers_seen: set[int] = field(default_factory=set)

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store the step's keys and values, then attend: ``[1, H, T, D]`` to ``[1, T, H, Dv]``."""
        store = self.stores[layer_idx]
        self.layers_seen.add(layer_idx)
        store.write(self.slots, self.offsets, key[0].transpose(0, 1), value[0].transpose(0, 1))
        if self.copies:
            store.copy(self.copies)
        if self.pack_to.numel():
            store.pack(self.pack_from, self.pack_to)
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
                *layer_codecs(settings, shapes, layer), settings.policy(layer), num_sinks=settings.num_sinks,
                plain_pages=plain_pages, packed_pages=packed_pages, kv_heads=shape.kv_heads, key_dim=shape.key_dim,
                value_dim=shape.value_dim, dtype=model.dtype, device=self.device,
            )
            for layer, shape in enumerate(shapes)
        ]  # fmt: skip
        self.is_raw = not packed_pages
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
        packs = np.asarray([(page.plain, page.packed) for page in plan.packs], np.int32).reshape(-1, 2)
        return Forward(
            self.stores,
            self._on_device(np.concatenate(slots)),
            self._on_device(np.concatenate(offsets)),
            plan.copies,
            self._on_device(packs[:, 0].astype(np.int64)),
            self._on_device(np.ascontiguousarray(packs[:, 1])),
            self._tables(plan.segments),
        )

    def _tables(self, segments: Sequence[Segment]) -> list[RowTables]:
        """Cut the rows into calls whose scores fit the caches, and list each row's pages."""
        layout = self.settings.layout
        at = np.concatenate([np.arange(s.start, s.end) for s in segments])
        owner = np.concatenate([np.full(s.end - s.start, i) for i, s in enumerate(segments)])
        num_pages = layout.pages_after(at)
        tables = []
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
                packed = [page.plain if self.is_raw else page.packed for page in body[:count]]
                block_table[mine, :count] = np.asarray(packed, np.int32)
                plain = np.asarray([plain_slot(page) for page in body] or [0], np.int32)
                if sink_pages:
                    plain_table[mine, 0] = plain_slot(pages[0])
                wanted = num_pages[rows][mine][:, None] + np.arange(plain_table.shape[1] - sink_pages)
                plain_table[mine, sink_pages:] = plain[np.minimum(wanted, len(plain) - 1)]
            plain_len = at[rows] + 1 - num_pages[rows] * layout.page_size
            tables.append(
                RowTables(
                    int(first), int(last), self._on_device(block_table),
                    self._on_device(num_pages[rows].astype(np.int32)), self._on_device(plain_table),
                    self._on_device(plain_len.astype(np.int32)),
                    torch.zeros(last - first, self.num_heads, 5, dtype=torch.float64, device=self.device),
                )
            )  # fmt: skip
        return tables

    def _cuts(self, num_pages: NDArray[np.int64]) -> list[int]:
        """Rows at which a new call begins, and the end."""
        size, cuts, most = self.settings.page_size, [0], 0
        for row, pages in enumerate(num_pages.tolist()):
            most = max(most, pages)
            is_full = (row + 1 - cuts[-1]) * most * size * self.num_heads * 4 > _LOGITS_BYTES
            if row > cuts[-1] and is_full:
                cuts.append(row)
                most = pages
        return [*cuts, len(num_pages)]

    def _count(self, tables: list[RowTables]) -> None:
        for table in tables:
            scored, _, kept, mass, _ = table.stats.sum((0, 1)).tolist()
            self.traffic.scored += scored
            self.traffic.kept += kept
            self.traffic.mass += mass
            self.traffic.rows += table.last - table.first


def plain_slot(page: TreePage) -> int:
    """The slot of a page's plain form; -1 if it has none."""
    return -1 if page.plain is None else page.plain


def layer_codecs(settings: TwilightConfig, shapes: Sequence[LayerShape], layer: int) -> tuple[KeyCodec, ValueCodec]:
    """The codecs of a layer; raw ones where its heads do not pack into whole bytes."""
    key_codec, value_codec = settings.codecs(layer)
    return key_codec.for_heads(shapes[layer].key_dim), value_codec.for_heads(shapes[layer].value_dim)
