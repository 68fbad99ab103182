"""What the decode steps of one layer did, summed over steps."""

from __future__ import annotations

import torch
from torch import Tensor

from .selectors import Selection

_NAMES = ("scored", "needed", "kept", "mass", "candidates")  # columns of the sums, see decode_attention


class DecodeStats:
    """Sums since the first step, or since the batch changed its shape.

    Attributes:
        steps: decode steps that were counted.
        sums: ``[B, H, 5]`` float64, what ``decode_attention`` adds to; None before the first step.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget every step."""
        self.steps = 0
        self.sums: Tensor | None = None
        self._coverage = torch.zeros(0, 0)  # [B, H] float64, added to by selections; NaN where unknown
        self._num_whole = 0  # steps at which every packed token was a candidate

    def begin(self, query: Tensor, selection: Selection | None, num_pages: Tensor, min_pages: int) -> Tensor:
        """Count a step of ``query [B, H, D]`` and return the sums to add to.

        Rows with fewer pages, ``num_pages [B]``, than ``min_pages`` do not look at the selection.
        """
        if self.sums is None or self.sums.shape[:2] != query.shape[:2]:
            self.clear()
            self.sums = torch.zeros(*query.shape[:2], 5, dtype=torch.float64, device=query.device)
            self._coverage = torch.zeros_like(self.sums[..., 0])
        self.steps += 1
        if selection is None:
            self._num_whole += 1
        else:
            known = torch.nan if selection.coverage is None else selection.coverage
            is_whole = (num_pages < min_pages)[:, None]
            # never in place: a tensor of inference mode may not be written to outside of it
            self._coverage = self._coverage + torch.where(is_whole, 1.0, known)
        return self.sums

    def count_whole(self, steps: int) -> None:
        """Count ``steps`` more (less, if negative) that add to ``sums`` without ``begin``, every token a candidate.

        A captured graph adds to the sums each time it is replayed, and not when it is captured.
        """
        self.steps += steps
        self._num_whole += steps

    def select_rows(self, index: Tensor) -> None:
        """Keep, repeat or reorder rows."""
        if self.sums is not None:
            self.sums, self._coverage = self.sums.index_select(0, index), self._coverage.index_select(0, index)

    def means(self) -> dict[str, list[float]] | None:
        """Means of the sums over steps and rows, per query head, by name; None before the first step."""
        if self.sums is None:
            return None
        columns = (self.sums.sum(0) / (self.steps * self.sums.shape[0])).T.tolist()
        return dict(zip(_NAMES, columns, strict=True))

    def mean_coverage(self) -> list[float] | None:
        """Share of the attention mass that candidates, sinks and window carry, per query head; None if unknown."""
        if self.sums is None or bool(self._coverage.isnan().any()):
            return None
        mean: list[float] = ((self._coverage.mean(0) + self._num_whole) / self.steps).tolist()
        return mean
