from __future__ import annotations

import itertools

import pytest

from hf_twilight.bit_allocation import Option, allocate_bytes, scaled_drift

BITS = (2, 3, 4, 8)


def _items(drifts: list[float]) -> list[list[Option]]:
    return [[Option(bits, 0, 8.0 * bits, scaled_drift(drift, 2, bits)) for bits in BITS] for drift in drifts]


def _bits(chosen: list[Option]) -> list[int]:
    return [option.bits for option in chosen]


def test_scaled_drift_follows_the_step() -> None:
    assert scaled_drift(0.3, 3, 3) == 0.3
    assert scaled_drift(0.3, 3, 4) == pytest.approx(0.3 * (7 / 15) ** 2)
    assert scaled_drift(-1e-9, 2, 3) == 0.0  # noise of a layer that does not matter


def test_allocate_bytes_spends_where_it_matters() -> None:
    assert _bits(allocate_bytes(_items([1e-6, 1e-2, 1e-6]), budget=3 * 16 + 16)) == [2, 4, 2]
    assert _bits(allocate_bytes(_items([1e-3, 1e-3]), budget=2 * 24)) == [3, 3]
    assert _bits(allocate_bytes(_items([1e-3, 1e-3]), budget=1000)) == [8, 8]
    assert _bits(allocate_bytes(_items([0.0, -1.0]), budget=1000)) == [2, 2]  # nothing to gain


def test_allocate_bytes_passes_over_what_costs_more_and_saves_less() -> None:
    refined, more_bits = Option(2, 8, 20.0, 1e-4), Option(3, 0, 24.0, 2e-3)
    assert allocate_bytes([[Option(2, 0, 16.0, 1e-2), refined, more_bits]], budget=100) == [refined]


@pytest.mark.parametrize("budget", [64, 72, 80, 100, 140])
def test_allocate_bytes_is_near_the_best_of_all_choices(budget: int) -> None:
    items = _items([7e-4, 2e-3, 9e-5, 4e-3])
    chosen = allocate_bytes(items, budget)
    fitting = [some for some in itertools.product(*items) if sum(o.token_bytes for o in some) <= budget]
    drifts = [sum(option.drift for option in some) for some in fitting]
    assert sum(option.token_bytes for option in chosen) <= budget
    assert sum(option.drift for option in chosen) <= min(drifts) + 0.1 * (max(drifts) - min(drifts))


def test_allocate_bytes_refuses_a_budget_below_the_smallest() -> None:
    with pytest.raises(ValueError, match="must hold the smallest of everything, 32 bytes a token, got 31"):
        allocate_bytes(_items([1.0, 1.0]), budget=31)
