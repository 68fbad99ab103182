from __future__ import annotations

import itertools

import pytest

from hf_twilight.bit_allocation import BITS, Item, allocate_bits


def _items(drifts: list[float]) -> list[Item]:
    return [Item(layer, "keys", {2: drift}, 64) for layer, drift in enumerate(drifts)]


def test_expected_drift_is_measured_or_follows_the_step() -> None:
    item = Item(0, "keys", {2: 0.9, 3: 0.3}, 64)
    assert item.expected(2) == 0.9
    assert item.expected(3) == 0.3
    assert item.expected(4) == pytest.approx(0.3 * (7 / 15) ** 2)
    assert Item(0, "keys", {2: -1e-9}, 64).expected(3) == 0.0  # noise of a layer that does not matter


def test_allocate_bits_spends_where_it_matters() -> None:
    assert allocate_bits(_items([1e-6, 1e-2, 1e-6]), budget=3 * 16 + 16) == [2, 4, 2]
    assert allocate_bits(_items([1e-3, 1e-3]), budget=2 * 24) == [3, 3]
    assert allocate_bits(_items([1e-3, 1e-3]), budget=1000) == [8, 8]
    assert allocate_bits(_items([0.0, -1.0]), budget=1000) == [2, 2]  # nothing to gain


@pytest.mark.parametrize("budget", [64, 72, 80, 100, 140])
def test_allocate_bits_is_near_the_best_of_all_choices(budget: int) -> None:
    drifts = [7e-4, 2e-3, 9e-5, 4e-3]
    items = [Item(i, "keys", {2: d, 3: d / (3 + i)}, 64) for i, d in enumerate(drifts)]
    chosen = allocate_bits(items, budget)

    def drift(bits: tuple[int, ...] | list[int]) -> float:
        return sum(item.expected(b) for item, b in zip(items, bits, strict=True))

    allowed = [bits for bits in itertools.product(BITS, repeat=4) if sum(bits) * 8 <= budget]
    assert sum(chosen) * 8 <= budget
    best, worst = min(map(drift, allowed)), max(map(drift, allowed))
    assert drift(chosen) <= best + 0.1 * (worst - best)


def test_allocate_bits_refuses_a_budget_below_two_bits() -> None:
    with pytest.raises(ValueError, match="must hold 2 bits a number, 32 bytes a token, got 31"):
        allocate_bits(_items([1.0, 1.0]), budget=31)
