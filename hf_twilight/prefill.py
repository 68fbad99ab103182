"""Sparse prefill of one layer: when it pays, and what it did (SampleAttention, arXiv 2406.15486)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twilight_kernels import StripePlan, attend_stripes, has_kernels, select_stripes

from .config import TwilightConfig


@dataclass(frozen=True)
class _Report:
    """What one forward chose: ``found [B, K, N, 4]`` as ``select_stripes`` reports, and its shape."""

    found: Tensor
    rows: int
    total: int
    padding: tuple[int, ...]


class SparsePrefill:
    """Attention of many query rows at once, to sinks, a window and the keys that carry the mass.

    Args:
        settings: of the cache.
        layer_idx: place of the layer in the model.
    """

    def __init__(self, settings: TwilightConfig, layer_idx: int) -> None:
        self.plan: StripePlan = settings.stripe_plan
        self.min_keys = settings.min_prefill_len
        self.is_on = settings.alpha < 1.0 and layer_idx not in settings.dense_layers
        self._reports: list[_Report] = []

    def pays(self, query: Tensor, keys: Tensor) -> bool:
        """Whether ``query [B, H, T, D]`` over ``keys [B, K, S, D]`` is worth choosing keys for.

        Fewer rows than a strip have too few samples to choose by; few keys are read faster than chosen.
        """
        if not self.is_on or not has_kernels(query.device, query.dtype):
            return False
        return keys.shape[2] >= self.min_keys and query.shape[2] >= self.plan.strip

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, padding: Sequence[int]) -> Tensor:
        """Attend the last T of S positions: ``[B, H, T, D]`` to ``[B, H, T, Dv]``; rows of padding are zero."""
        pads = torch.tensor(padding, dtype=torch.int32, device=query.device)
        mask, found = select_stripes(query, keys, self.plan, scaling=scaling, padding=pads)
        self._reports.append(_Report(found, query.shape[2], keys.shape[2], tuple(padding)))
        return attend_stripes(query, keys, values, mask, self.plan, scaling=scaling, padding=pads)

    def clear(self) -> None:
        """Forget what was done."""
        self._reports = []

    def stats(self) -> dict[str, Any] | None:
        """What prefill attended to, None if nothing was sparse.

        Returns:
            Per KV head: ``density``, share of the causal query-key pairs that were computed; ``stripes``, mean number
            of keys chosen for a strip; ``mass`` and ``mass_q05``, what the sampled rows keep by columns that other
            rows chose: mean over strips, and mean over strips of the 5 % quantile of rows.
        """
        if not self._reports:
            return None
        done, pairs = torch.zeros(self._reports[0].found.shape[1]), 0
        strips: list[Tensor] = []  # [K, 4]
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
                    done += own * (always + strips[-1][:, 0]) + triangle
                    pairs += own * position + triangle
        mean = torch.stack(strips).mean(0)
        return {
            "density": (done / pairs).tolist(),
            "stripes": mean[:, 0].tolist(),
            "mass": mean[:, 2].tolist(),
            "mass_q05": mean[:, 3].tolist(),
        }
