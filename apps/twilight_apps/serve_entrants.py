"""Who serves in ``bench serve``: our engine, Transformers' continuous batching, and ``generate`` in turn."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from . import models
from .serve_play import Answer, Pending
from .workloads import Workload

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase

    from hf_twilight import TwilightConfig

_NO_END = -1
_POLL_S = 0.05
_STOP_S = 5.0


@dataclass
class Twilight:
    """Our engine.

    Args:
        model: of its own, since its attention function stays switched.
        tokenizer: of the model.
        settings: how pages are packed.
        is_salted: give every prompt another first token, so that nothing can be shared.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: TwilightConfig
    is_salted: bool = False

    @contextmanager
    def open(self, workload: Workload) -> Iterator[_OurServing]:
        """Start an engine."""
        from hf_twilight.engine import Engine

        tokens = _room(workload)
        with Engine(
            self.model, self.tokenizer, settings=self.settings, max_running=len(workload.clients),
            max_waiting=workload.num_requests, max_cache_tokens=tokens,
        ) as engine:  # fmt: skip
            yield _OurServing(engine, self.is_salted)


@dataclass
class _OurServing:
    engine: Any
    is_salted: bool
    count: int = 0

    def submit(self, prompt: list[int], new_tokens: int) -> _OurTicket:
        from hf_twilight.engine import SamplingParams

        self.count += 1
        prompt = [self.count, *prompt[1:]] if self.is_salted else prompt
        return _OurTicket(self.engine.submit(prompt, SamplingParams(max_tokens=new_tokens, ignore_eos=True)))

    def counters(self) -> dict[str, float]:
        stats = self.engine.stats()
        names = ("cached_tokens", "recomputed_rows", "evictions", "preemptions", "peak_pages", "kv_bytes")
        return {name: getattr(stats, name) for name in (*names, "scored_tokens", "kept_tokens", "kept_mass")}


@dataclass
class _OurTicket:
    handle: Any

    def wait(self) -> Answer:
        times, done = [], None
        for token in self.handle:
            if token.token_id >= 0:
                times.append(time.perf_counter())
        done = self.handle.result()
        return Answer(done.token_ids, times, done.cached_tokens)


@dataclass
class ContinuousBatching:
    """Transformers' continuous batching.

    Args:
        model: with stock attention.
        is_tuned: small pages and batches, and a cache made for the workload; else its defaults, but for memory.
        memory_share: of the machine's memory that its default cache may take (Transformers' own default is 0.6).
    """

    name: str
    model: PreTrainedModel
    is_tuned: bool
    memory_share: float

    @contextmanager
    def open(self, workload: Workload) -> Iterator[_TheirServing]:
        """Start a manager."""
        from transformers import GenerationConfig

        models.use_attention(self.model, models.STOCK_ATTENTION)
        plain = GenerationConfig(do_sample=False, eos_token_id=_NO_END, pad_token_id=0)
        model: Any = self.model
        with ExitStack() as stack:
            opened = model.continuous_batching_context_manager(
                generation_config=plain, continuous_batching_config=self._config(workload), timeout=_STOP_S
            )
            try:
                manager = stack.enter_context(opened)
            except (ValueError, MemoryError) as error:
                raise MemoryError(f"its cache finds no room ({error}); change --memory-share") from error
            serving = _TheirServing(manager)
            collector = threading.Thread(target=serving.collect, daemon=True)
            collector.start()
            try:
                yield serving
            finally:
                serving.is_done = True
                collector.join()

    def _config(self, workload: Workload) -> ContinuousBatchingConfig:
        from transformers import ContinuousBatchingConfig

        if not self.is_tuned:
            return ContinuousBatchingConfig(max_memory_percent=self.memory_share)
        page = 16
        return ContinuousBatchingConfig(page_size=page, max_batch_tokens=512, num_blocks=_room(workload) // page + 1)


@dataclass
class _TheirServing:
    manager: Any
    is_done: bool = False
    tickets: dict[str, Pending] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def submit(self, prompt: list[int], new_tokens: int) -> Pending:
        with self.lock:
            name = self.manager.add_request(
                prompt, max_new_tokens=new_tokens, record_timestamps=True, eos_token_id=_NO_END
            )
            ticket = self.tickets[name] = Pending()
        return ticket

    def collect(self) -> None:
        """Hand results to their tickets until done."""
        while not self.is_done:
            result = self.manager.get_result(timeout=_POLL_S)
            if result is None:
                if not self.manager.is_running():
                    self._fail("continuous batching stopped by itself")
                    return
                continue
            if result.is_finished():
                with self.lock:
                    ticket = self.tickets[result.request_id]
                if result.error is not None:
                    ticket.error = RuntimeError(result.error)
                else:
                    ticket.answer = Answer(list(result.generated_tokens), list(result.timestamps))
                ticket.is_finished.set()

    def counters(self) -> dict[str, float]:
        cache = self.manager.batch_processor.cache
        return {"allocated_tokens": cache.max_tokens_read}

    def _fail(self, reason: str) -> None:
        for ticket in self.tickets.values():
            if not ticket.is_finished.is_set():
                ticket.error = RuntimeError(reason)
                ticket.is_finished.set()


@dataclass
class Sequential:
    """``model.generate``, one request after the other, with the stock cache."""

    name: str
    model: PreTrainedModel

    @contextmanager
    def open(self, workload: Workload) -> Iterator[_SequentialServing]:
        """Start a worker."""
        models.use_attention(self.model, models.STOCK_ATTENTION)
        serving = _SequentialServing(self.model)
        worker = threading.Thread(target=serving.work, daemon=True)
        worker.start()
        try:
            yield serving
        finally:
            serving.is_done = True
            serving.inbox.put(None)
            worker.join()


@dataclass
class _SequentialServing:
    model: Any
    is_done: bool = False
    inbox: queue.SimpleQueue[tuple[list[int], int, Pending] | None] = field(default_factory=queue.SimpleQueue)

    def submit(self, prompt: list[int], new_tokens: int) -> Pending:
        ticket = Pending()
        self.inbox.put((prompt, new_tokens, ticket))
        return ticket

    def work(self) -> None:
        """Serve until told to stop."""
        while (item := self.inbox.get()) is not None and not self.is_done:
            prompt, new_tokens, ticket = item
            try:
                ticket.answer = self._generate(prompt, new_tokens)
            except Exception as error:  # the one who waits must hear of it
                ticket.error = error
            ticket.is_finished.set()

    def counters(self) -> dict[str, float]:
        return {}

    def _generate(self, prompt: list[int], new_tokens: int) -> Answer:
        clock, model = _Clock(), self.model
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
                eos_token_id=_NO_END, pad_token_id=0, streamer=clock,
            )  # fmt: skip
        return Answer(out[0, len(prompt) :].tolist(), clock.times[1:])


@dataclass
class _Clock:
    """Note when ``generate`` hands over the prompt and each token."""

    times: list[float] = field(default_factory=list)

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _room(workload: Workload) -> int:
    """Tokens that all conversations of a workload have together, and a little more."""
    lengths: Sequence[int] = [
        sum(len(turn.added) + turn.new_tokens for turn in client.turns) for client in workload.clients
    ]
    return sum(lengths) + 256 * (len(lengths) + 1)
