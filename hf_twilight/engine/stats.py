"""What an engine did and holds, in numbers that a test can check."""

from __future__ import annotations

from dataclasses import dataclass

from .runner import Runner
from .scheduler import Scheduler


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made, and what it holds now.

    Attributes:
        running, waiting: requests.
        forward_calls: steps.
        prefill_rows: prompt tokens computed, those computed again included.
        recomputed_rows: of those, computed again after a request had lost its pages.
        decode_rows: generated tokens computed.
        cached_tokens: prompt tokens found stored.
        generated_tokens: tokens chosen.
        evictions: pages dropped from the cache to make room.
        preemptions: times a request lost its pages.
        pages_used, pages_free: packed pages (plain ones for raw codecs) that hold tokens, and that do not.
        pages_idle: of the used ones, cached and held by no request.
        peak_pages: most ``pages_used``.
        plain_pages_used: pages in the model's dtype.
        kv_bytes: bytes of the used pages, all layers.
        scored_tokens, kept_tokens: packed tokens scored and attended, summed over rows, layers and query heads.
        kept_mass: mean share of the attention mass that was attended.
    """

    running: int
    waiting: int
    forward_calls: int
    prefill_rows: int
    recomputed_rows: int
    decode_rows: int
    cached_tokens: int
    generated_tokens: int
    evictions: int
    preemptions: int
    pages_used: int
    pages_free: int
    pages_idle: int
    peak_pages: int
    plain_pages_used: int
    kv_bytes: int
    scored_tokens: float
    kept_tokens: float
    kept_mass: float


def collect_stats(scheduler: Scheduler, runner: Runner, in_inbox: int, generated: int) -> EngineStats:
    """Read the counters; from another thread they may be a step apart."""
    tree, counters, traffic = scheduler.tree, scheduler.counters, runner.traffic
    pool = tree.packed_pool or tree.plain_pool
    plain_bytes, packed_bytes = (sum(sizes) for sizes in zip(*(s.num_bytes() for s in runner.stores), strict=True))
    used = pool.num_used
    held = len({page.serial for request in list(scheduler.running) for page in list(request.pages)
                if (page.packed if tree.packed_pool is not None else page.plain) is not None})  # fmt: skip
    packed_used = 0 if tree.packed_pool is None else tree.packed_pool.num_used
    samples = traffic.rows * len(runner.stores) * runner.num_heads
    return EngineStats(
        running=len(scheduler.running),
        waiting=len(scheduler.waiting) + in_inbox,
        forward_calls=counters.steps,
        prefill_rows=counters.prefill_rows,
        recomputed_rows=counters.recomputed_rows,
        decode_rows=counters.decode_rows,
        cached_tokens=counters.cached_tokens,
        generated_tokens=generated,
        evictions=tree.evictions,
        preemptions=counters.preemptions,
        pages_used=used,
        pages_free=(pool.max_pages or 0) - used,
        pages_idle=used - held,
        peak_pages=counters.peak_pages,
        plain_pages_used=tree.plain_pool.num_used,
        kv_bytes=tree.plain_pool.num_used * plain_bytes + packed_used * packed_bytes,
        scored_tokens=traffic.scored,
        kept_tokens=traffic.kept,
        kept_mass=traffic.mass / samples if samples else 1.0,
    )
