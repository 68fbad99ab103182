"""How a sparse prefill chooses keys: strips of query rows, sampled rows, what they must keep."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StripePlan:
    """How a sparse prefill chooses keys.

    Args:
        alpha: share of the attention mass that the sampled rows of a strip keep on average, in ``(0, 1]``.
        floor: share that 95 % of them keep at least, at most ``alpha``.
        window: last keys before a strip that all its rows see.
        num_sinks: first keys that all rows see.
        strip: query rows that share their stripes, a multiple of 64.
        samples: rows of a strip whose attention is computed to choose them, a multiple of 16 that divides ``strip``.
    Raises:
        ValueError: a value outside those ranges.
    """

    alpha: float = 0.95
    floor: float = 0.9
    window: int = 256
    num_sinks: int = 16
    strip: int = 256
    samples: int = 16

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha <= 1.0:
            raise ValueError(f"alpha must be in (0, 1], got {self.alpha}; pass 1.0 to keep every key")
        if not 0.0 <= self.floor <= self.alpha:
            raise ValueError(f"floor must be in [0, alpha = {self.alpha}], got {self.floor}")
        if self.strip <= 0 or self.strip % 64:
            raise ValueError(f"strip must be a positive multiple of 64, got {self.strip}; pass 128 or 256")
        if self.samples <= 0 or self.samples % 16 or self.strip % self.samples:
            raise ValueError(
                f"samples must be a multiple of 16 that divides strip = {self.strip}, got {self.samples}; pass 16 or 32"
            )
        if self.window < 0 or self.num_sinks < 0:
            raise ValueError(f"window and num_sinks must be 0 or more, got {self.window} and {self.num_sinks}")

    def max_strips(self, rows: int) -> int:
        """Most strips that ``rows`` query rows can touch."""
        return (rows + self.strip - 2) // self.strip + 1

    def strips(self, rows: int, total: int, pad: int) -> list[tuple[int, int]]:
        """First query row of each strip, and the one after its last.

        Strips begin at fixed positions of real tokens, so that neither padding nor chunks move them.

        Args:
            rows: query rows, the last of ``total`` positions.
            total: positions.
            pad: leading positions that are padding.
        """
        lead = total - rows - pad  # real position of query row 0
        first, found = max(0, -lead), []
        while first < rows:
            end = min(rows, first + self.strip - (lead + first) % self.strip)
            found.append((first, end))
            first = end
        return found

    def sampled_rows(self, first: int, end: int, lead: int) -> list[int]:
        """Query rows of a strip that are sampled: at fixed positions, and the last; ``lead`` is row 0's."""
        every = self.strip // self.samples
        return [row for row in range(first, end) if (lead + row + 1) % every == 0 or row == end - 1]
