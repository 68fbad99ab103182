"""Prefill of one layer: when our attention pays, when it is sparse, which heads that is not for, and what it did.

SampleAttention (arXiv 2406.15486) chooses keys from sampled rows. Some heads defeat that: each of their rows looks for
one key that no other row wants, and the model copies what it finds, as in retrieval heads (arXiv 2404.15574). They are
few, and do most of the harm. Sampled rows give them away: where more than a share of a KV head's rows retrieve, it
attends to everything from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twilight_kernels import StripePlan, attend_stripes, has_kernels, has_matrix_tiles, select_stripes

from .config import TwilightConfig

_MIN_DENSE_ROWS = 128  # query rows from which dense attention on matrix tiles is faster than the stock function
_PRIOR_ROWS = 96  # sampled rows that do not retrieve, which a head starts with: a first one decides nothing


@dataclass(frozen=True)
class _Report:
    """What one forward chose: ``found [B, K, N, 6]``, as ``select_stripes`` reports and 1 if dense, and its shape."""

    found: Tensor
    rows: int
    total: int
    padding: tuple[int, ...]


class SparsePrefill:
    """Attention of many query rows at once, to sinks, a window and the keys that carry the mass.

    Where that does not pay, and the CPU has matrix tiles, to all keys on those. With ``alpha`` 1 it is never used.

    Args:
        settings: of the cache.
        layer_idx: place of the layer in the model.
    """

    def __init__(self, settings: TwilightConfig, layer_idx: int) -> None:
        self.plan: StripePlan = settings.stripe_plan
        self.min_keys = settings.min_prefill_len
        self.is_on = settings.alpha < 1.0
        self.is_dense_layer = layer_idx in settings.dense_layers
        self.max_retrieving = settings.max_retrieving
        self._reports: list[_Report] = []
        self._room: Tensor | None = None  # what ``make_room`` made
        self._counted: Tensor | None = None  # [B, K, 2] sampled rows that retrieve, and all, of earlier forwards

    def make_room(self, batch: int, kv_heads: int, rows: int) -> None:
        """Make the report on a prompt before its forward goes on, see ``TwilightLayer.make_room``."""
        if self.is_on and not self.is_dense_layer and rows >= max(self.min_keys, self.plan.strip):
            self._room = torch.empty(batch, kv_heads, self.plan.max_strips(rows), 6)

    def pays(self, query: Tensor, keys: Tensor) -> bool:
        """Whether ``attend`` beats the stock function for ``query [B, H, T, D]`` over ``keys [B, K, S, D]``."""
        if not self.is_on or not has_kernels(query.device, query.dtype):
            return False
        return self._is_sparse(query, keys) or (query.shape[2] >= _MIN_DENSE_ROWS and has_matrix_tiles(query.device))

    def _is_sparse(self, query: Tensor, keys: Tensor) -> bool:
        """Fewer rows than a strip have too few samples to choose by; few keys are read faster than chosen."""
        return not self.is_dense_layer and keys.shape[2] >= self.min_keys and query.shape[2] >= self.plan.strip

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, padding: Sequence[int]) -> Tensor:
        """Attend the last T of S positions: ``[B, H, T, D]`` to ``[B, H, T, Dv]``; rows of padding are zero."""
        if self._is_sparse(query, keys):
            mask = self.choose(query, keys, scaling, padding)
        else:
            shape = *keys.shape[:2], self.plan.max_strips(query.shape[2]), -(-keys.shape[2] // 8)
            mask = torch.full(shape, 255, dtype=torch.uint8, device=query.device)
        pads = torch.tensor(padding, dtype=torch.int32, device=query.device)
        return attend_stripes(query, keys, values, mask, self.plan, scaling=scaling, padding=pads)

    def choose(self, query: Tensor, keys: Tensor, scaling: float, padding: Sequence[int]) -> Tensor:
        """Choose the keys of each strip as ``select_stripes`` returns them, all of them in heads that retrieve."""
        pads = torch.tensor(padding, dtype=torch.int32, device=query.device)
        mask, found = select_stripes(query, keys, self.plan, scaling=scaling, padding=pads)
        is_dense = self._retrieves(found, query.shape[2], keys.shape[2], padding, query.shape[1] // keys.shape[1])
        mask.masked_fill_(is_dense[..., None], 255)
        room, self._room = self._room, None
        found = torch.cat([found, is_dense[..., None]], -1, out=room)
        self._reports.append(_Report(found, query.shape[2], keys.shape[2], tuple(padding)))
        return mask

    def _retrieves(self, found: Tensor, rows: int, total: int, padding: Sequence[int], q_per_kv: int) -> Tensor:
        """Count sampled rows that retrieve, strip by strip; return ``[B, K, N]`` which strips go dense.

        A strip is judged by itself and those before it, so that later text and the cutting into chunks change nothing.
        """
        sampled = torch.zeros(found.shape[0], 1, found.shape[2])
        for b, pad in enumerate(padding):
            lead = total - rows - pad
            counts = [self.plan.num_sampled(first, end, lead) for first, end in self.plan.strips(rows, total, pad)]
            sampled[b, 0, : len(counts)] = torch.tensor(counts)
        seen = (sampled * q_per_kv).to(found.device).expand(found.shape[:3])
        counted = torch.stack([found[..., 4] * seen, seen], -1).cumsum(2)  # [B, K, N, 2]
        if self._counted is not None and self._counted.shape[:2] == found.shape[:2]:
            counted = counted + self._counted[:, :, None]
        self._counted = counted[:, :, -1].clone()
        return counted[..., 0] > self.max_retrieving * (counted[..., 1] + _PRIOR_ROWS)

    def clear(self) -> None:
        """Forget what was done."""
        self._reports, self._room, self._counted = [], None, None

    def stats(self) -> dict[str, Any] | None:
        """What prefill attended to, None if nothing was sparse.

        Returns:
            Per KV head: ``density``, share of the causal query-key pairs that were computed; ``stripes``, mean number
            of keys chosen for a strip; ``mass`` and ``mass_q05``, what the sampled rows keep by columns that other
            rows chose: mean over strips, and mean over strips of the 5 % quantile of rows; ``retrieving``,
            share of them that retrieve; ``dense``, share of strips that attended to everything because of it.
        """
        if not self._reports:
            return None
        done, pairs = torch.zeros(self._reports[0].found.shape[1]), 0
        strips: list[Tensor] = []  # [K, 6]
        for report in self._reports:
            found = report.found.cpu()
            for b, pad in enumerate(report.padding):
                lead = report.total - report.rows - pad
                for n, (first, end) in enumerate(self.plan.strips(report.rows, report.total, pad)):
                    own, position = end - first, first + lead
                    slab = max(0, position - self.plan.window)
                    always = min(self.plan.num_sinks, slab) + position - slab
                    triangle = own * (own + 1) // 2
                    strips.append(found[b, :, n])
                    sparse = own * (always + strips[-1][:, 0]) + triangle
                    done += torch.where(strips[-1][:, 5] > 0, own * position + triangle, sparse)
                    pairs += own * position + triangle
        mean = torch.stack(strips).mean(0)
        return {
            "density": (done / pairs).tolist(),
            "stripes": mean[:, 0].tolist(),
            "mass": mean[:, 2].tolist(),
            "mass_q05": mean[:, 3].tolist(),
            "retrieving": mean[:, 4].tolist(),
            "dense": mean[:, 5].tolist(),
        }
