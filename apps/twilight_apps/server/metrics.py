"""Prometheus metrics: vLLM's names with our prefix, and what is ours (kept tokens, KV bytes)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hf_twilight.engine import EngineStats

if TYPE_CHECKING:
    from .jobs import Choice, Job

PREFIX = "hf_twilight"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
# metric, how it is read, help
_GAUGES: tuple[tuple[str, Callable[[EngineStats], float], str], ...] = (
    ("num_requests_running", lambda stats: stats.running, "Requests in the batch."),
    ("num_requests_waiting", lambda stats: stats.waiting, "Requests in the queue."),
    (
        "kv_cache_usage_perc",
        lambda stats: (stats.pages_used - stats.pages_idle) / max(1, stats.pages_used + stats.pages_free),
        "Share of the pages that running requests hold, 0 to 1.",
    ),
    ("kv_cache_bytes", lambda stats: stats.kv_bytes, "Bytes of stored keys and values, all layers."),
    ("pages_used", lambda stats: stats.pages_used, "Pages that hold tokens."),
    ("pages_idle", lambda stats: stats.pages_idle, "Of those, cached and held by no request."),
    ("pages_peak", lambda stats: stats.peak_pages, "Most pages in use so far."),
    ("kept_attention_mass", lambda stats: stats.kept_mass, "Mean share of the attention mass attended, 0 to 1."),
)
_COUNTERS: tuple[tuple[str, Callable[[EngineStats], float], str], ...] = (
    ("prompt_tokens", lambda stats: stats.prefill_rows + stats.cached_tokens, "Prompt tokens, computed or cached."),
    ("prompt_tokens_computed", lambda stats: stats.prefill_rows, "Prompt tokens computed."),
    ("prefix_cache_queries", lambda stats: stats.prefill_rows + stats.cached_tokens, "Prompt tokens looked up."),
    ("prefix_cache_hits", lambda stats: stats.cached_tokens, "Prompt tokens found stored."),
    ("generation_tokens", lambda stats: stats.generated_tokens, "Tokens generated."),
    ("num_preemptions", lambda stats: stats.preemptions, "Times a request lost its pages."),
    ("evicted_pages", lambda stats: stats.evictions, "Cached pages dropped to make room."),
    ("forward_calls", lambda stats: stats.forward_calls, "Steps of the engine."),
    ("scored_tokens", lambda stats: stats.scored_tokens, "Packed tokens scored, over rows, layers and heads."),
    ("kept_tokens", lambda stats: stats.kept_tokens, "Packed tokens attended, over rows, layers and heads."),
)


class Metrics:
    """All metrics of one server.

    Args:
        stats: reads the engine's statistics.
        model: value of the label ``model_name``.
    """

    def __init__(self, stats: Callable[[], EngineStats], model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats, model))
        labels = {"labelnames": ("model_name",), "registry": self._registry}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{PREFIX}:{name}", text, buckets=buckets, **labels).labels(model)  # type: ignore[arg-type]

        self._success = Counter(
            f"{PREFIX}:request_success", "Requests by how they ended.", ("model_name", "finished_reason"),
            registry=self._registry,
        )  # fmt: skip
        self._model = model
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._generated = histogram("request_generation_tokens", "Generated tokens of a request.", _TOKENS)
        self._first = histogram("time_to_first_token_seconds", "From request to first token.", _SECONDS)
        self._between = histogram("inter_token_latency_seconds", "Between two tokens of a request.", _SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "From request to last token.", _SECONDS)

    def record(self, job: Job) -> None:
        """Count a job that ended."""
        for choice in job.choices:
            self._record_choice(choice, job.started)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _record_choice(self, choice: Choice, started: float) -> None:
        done = choice.completion
        reason = done.finish_reason if done is not None else "error" if choice.handle.error else "cancelled"
        self._success.labels(self._model, reason).inc()
        if done is not None:
            self._prompt.observe(done.prompt_tokens)
        self._generated.observe(len(choice.tokens))
        if choice.times:
            self._first.observe(choice.times[0] - started)
            self._whole.observe(choice.times[-1] - started)
        for before, after in pairwise(choice.times):
            self._between.observe(after - before)


class _EngineCollector:
    """Read the engine's statistics when Prometheus asks, instead of copying them after each step."""

    def __init__(self, stats: Callable[[], EngineStats], model: str) -> None:
        self._stats = stats
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each statistic."""
        stats = self._stats()
        for name, read, text in _GAUGES:
            gauge = GaugeMetricFamily(f"{PREFIX}:{name}", text, labels=("model_name",))
            gauge.add_metric((self._model,), float(read(stats)))
            yield gauge
        for name, read, text in _COUNTERS:
            counter = CounterMetricFamily(f"{PREFIX}:{name}", text, labels=("model_name",))
            counter.add_metric((self._model,), float(read(stats)))
            yield counter
