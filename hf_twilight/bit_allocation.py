"""Bits of each layer under a byte budget: the least expected drift that fits.

Drifts of layers add up (see ``layer_drift``), so the choice is a knapsack with a few options an item. It is filled
greedily by drift saved per byte, jumps over several steps included, which is optimal but for the last item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BITS = (2, 3, 4, 8)
KEY_CLIPS = {2: 0.75, 3: 0.95}
"""The clip of keys that drifts least, by bits; whole range above. Searched on the embedded model, `decisions.md`."""


@dataclass(frozen=True)
class Item:
    """The keys or the values of one layer.

    Attributes:
        layer: its index.
        kind: ``"keys"`` or ``"values"``.
        drift: measured drift in nats at some of ``BITS``, the lowest included.
        numbers: numbers a token that it stores, all KV heads together.
    """

    layer: int
    kind: str
    drift: Mapping[int, float]
    numbers: int

    def expected(self, bits: int) -> float:
        """Return the drift at ``bits``: measured, or the next lower one scaled with the squared step of a level."""
        known = max(b for b in self.drift if b <= bits)
        step = float((1 << known) - 1) / ((1 << bits) - 1)
        return max(self.drift[known], 0.0) * step * step


def allocate_bits(items: Sequence[Item], budget: float) -> list[int]:
    """Choose the bits of each item.

    Args:
        items: what is stored.
        budget: bytes a token that all codes together may take.
    Returns:
        One of ``BITS`` for each item.
    Raises:
        ValueError: the budget does not hold the fewest bits.
    """
    bits = [BITS[0]] * len(items)
    left = budget - sum(item.numbers * BITS[0] / 8 for item in items)
    if left < 0:
        raise ValueError(f"budget must hold {BITS[0]} bits a number, {budget - left:g} bytes a token, got {budget:g}")
    while True:
        best, choice = 0.0, None
        for index, item in enumerate(items):
            for more in BITS[BITS.index(bits[index]) + 1 :]:
                cost = item.numbers * (more - bits[index]) / 8
                gain = (item.expected(bits[index]) - item.expected(more)) / cost
                if cost <= left and gain > best:
                    best, choice = gain, (index, more, cost)
        if choice is None:
            return bits
        index, bits[choice[0]], cost = choice
        left -= cost
