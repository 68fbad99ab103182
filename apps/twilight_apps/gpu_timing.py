"""Timing on a GPU: CUDA events, graphs where a graph can be captured, a cold L2 cache, entrants in turns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import timing

_FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
_WARMUP = 3
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 50


@dataclass(frozen=True)
class Entrant:
    """What is timed, and how it is launched: ``"graph"``, or ``"eager"`` with the reason why no graph."""

    run: Callable[[], object]
    launch: str


def prepare(run: Callable[[], object], device: torch.device) -> Entrant:
    """Warm ``run`` up and capture it in a CUDA graph, so that short kernels are not timed by their launches."""
    if device.type != "cuda":
        run()
        return Entrant(run, "eager: no CUDA device")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARMUP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:  # what waits for the host cannot be captured
        torch.cuda.synchronize()
        return Entrant(run, f"eager: {str(error).splitlines()[0]}")
    return Entrant(graph.replay, "graph")


def interleave(entrants: Mapping[str, Entrant], device: torch.device, budget_s: float) -> dict[str, dict[str, float]]:
    """Time every entrant once a round, starting each round with another one, for about ``budget_s``.

    Returns:
        Median, 20th and 80th percentile in milliseconds of each, and how many runs; see ``timing.summary``.
    """
    flush = torch.empty(_FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    names, times = list(entrants), dict[str, list[float]]()
    rounds = 1  # without a GPU times are not kept, and its kernels may be interpreted, which is slow
    if device.type == "cuda":
        first = {name: _run_ms(entrants[name].run, flush) for name in names}  # not kept: it pages code in
        first = {name: _run_ms(entrants[name].run, flush) for name in names}
        rounds = int(budget_s * 1e3 / max(1e-3, sum(first.values())))
        rounds = max(_LEAST_ROUNDS, min(_MOST_ROUNDS, rounds))
    for index in range(rounds):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            times.setdefault(name, []).append(_run_ms(entrants[name].run, flush))
    return {name: timing.summary(times[name]) for name in names}


def time_rows(
    entrants: Mapping[str, Entrant], ours: Collection[str], device: torch.device, budget_s: float
) -> list[dict[str, Any]]:
    """Time entrants in turns; one row each, ready for JSON."""
    times = interleave(entrants, device, budget_s)
    return [
        {"name": name, "is_ours": name in ours, "launch": found.launch, "ms": times[name]}
        for name, found in entrants.items()
    ]


def kernel_shares(run: Callable[[], object], names: set[str], device: torch.device) -> float | None:
    """Share of the device time of ``run`` that kernels called ``names`` take; None without a GPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(10):
            run()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in found.key_averages():
        own: Any = getattr(event, "self_device_time_total", 0.0)
        if own and str(getattr(event, "device_type", "")).endswith("CUDA"):
            spent[event.key] = spent.get(event.key, 0.0) + float(own)
    return sum(time for name, time in spent.items() if name in names) / sum(spent.values()) if spent else None


def _run_ms(run: Callable[[], object], flush: torch.Tensor) -> float:
    flush.zero_()
    if not flush.is_cuda:
        return timing.run_ms(run)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    run()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after))
