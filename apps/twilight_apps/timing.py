"""Interleaved timing: every entrant runs once in each round, so that a noisy machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch


def interleave(
    entrants: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 2,
    before: Callable[[], object] = lambda: None,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time each entrant once a round, starting each round with another one.

    Args:
        entrants: what to run, by name; inputs are made before.
        rounds: timed rounds, at least 1.
        warmup: rounds before them that are not kept.
        before: called before each run, and not timed.
        on_round: called after each round.
    Returns:
        Milliseconds of each entrant's runs, one a round.
    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    names = list(entrants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            before()
            elapsed = run_ms(entrants[name])
            if index >= warmup:
                times[name].append(elapsed)
        on_round()
    return times


def run_ms(work: Callable[[], object]) -> float:
    """Return the milliseconds that one call takes, device work included."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(times: Sequence[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile of milliseconds, and how many there are."""
    low, middle, high = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    ).tolist()  # fmt: skip
    return {"median": middle, "p20": low, "p80": high, "runs": len(times)}
