"""How each layer is packed under a byte budget: the least expected drift that fits.

Drifts of layers add up (see ``layer_drift``), so the choice is a knapsack with a few options an item. It is filled
greedily by drift saved per byte, jumps over several steps included, which is optimal but for the last item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

VALUE_BITS = (2, 3, 4, 8)
KEY_FORMS = ((2, 0.0), (2, 0.125), (2, 0.25), (2, 0.5), (3, 0.25), (4, 0.25), (8, 0.0))
"""Bits of keys and share of the channels that are refined, by bytes; other pairs never paid, see `decisions.md`."""
KEY_CLIPS = {2: 0.75, 3: 0.95}
"""The clip of keys that drifts least, by bits; whole range above. Searched on the embedded model, `decisions.md`."""


@dataclass(frozen=True)
class Option:
    """One way to pack the keys or the values of one layer.

    Attributes:
        bits: of a number.
        refined: channels of each KV head that are stored twice.
        token_bytes: bytes of a token, all KV heads and scales.
        drift: expected of it alone, nats a token.
    """

    bits: int
    refined: int
    token_bytes: float
    drift: float


def scaled_drift(known: float, known_bits: int, bits: int) -> float:
    """Expect the drift at ``bits`` from one measured at ``known_bits``: it follows the squared step of a level."""
    step = float((1 << known_bits) - 1) / ((1 << bits) - 1)
    return max(known, 0.0) * step * step


def allocate_bytes(items: Sequence[Sequence[Option]], budget: float) -> list[Option]:
    """Choose an option of each item.

    Args:
        items: options of the keys or values of each layer, the first the smallest.
        budget: bytes a token that all of them together may take.
    Returns:
        One option of each item.
    Raises:
        ValueError: the budget does not hold the smallest.
    """
    chosen = [options[0] for options in items]
    least = sum(option.token_bytes for option in chosen)
    if least > budget:
        raise ValueError(f"budget must hold the smallest of everything, {least:g} bytes a token, got {budget:g}")
    left = budget - least
    while True:
        best, better = 0.0, None
        for index, options in enumerate(items):
            for option in options:
                cost = option.token_bytes - chosen[index].token_bytes
                gain = chosen[index].drift - option.drift
                if 0 < cost <= left and gain > best * cost:
                    best, better = gain / cost, (index, option)
        if better is None:
            return chosen
        index, option = better
        left -= option.token_bytes - chosen[index].token_bytes
        chosen[index] = option
