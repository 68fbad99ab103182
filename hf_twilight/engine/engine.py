"""The engine: many requests, one model, shared prefixes, one worker thread that owns model and pages."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twilight_cache import PagePool, PrefixTree

from ..config import TwilightConfig, as_config
from .eligibility import attention_switched, check_model, context_of, end_tokens, probe, vocab_size
from .handle import Completion, FinishReason, RequestHandle, Timings, Token
from .runner import Runner, key_codec, value_codec
from .sampling import Choice, SamplingParams, choose
from .scheduler import ScheduledRequest, Scheduler, StepPlan
from .stats import EngineStats, collect_stats
from .text import TextStream

logger = logging.getLogger(__name__)

_DEFAULT_TOKENS = 2048  # of cache for each request that may run, where nobody says how many


class QueueFull(RuntimeError):
    """Too many requests wait already; ``retry_after_s`` guesses when one will have left."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineClosed(RuntimeError):
    """The engine was closed, or died of the error that is this one's cause."""


@dataclass(eq=False)
class _Live:
    """A request as the engine sees it."""

    scheduled: ScheduledRequest
    params: SamplingParams
    handle: RequestHandle
    stream: TextStream
    seed: int
    submitted: float
    started: float | None = None
    first_token: float | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    text: str = ""


class Engine:
    """Serve many requests with one model and one packed cache.

    The greedy answer to a request is the one it gets alone, whatever else runs, is shared, cut into chunks, evicted
    or cancelled: what is computed for a token depends on the tokens before it only (see ``runner.py``).

    Args:
        model: a decoder all of whose layers are full attention, in eval mode.
        tokenizer: of the model.
        settings: a ``TwilightConfig``, a dict of settings or a preset's name.
        max_running: requests that run at a time.
        max_waiting: requests that wait at a time; one more raises ``QueueFull``.
        max_cache_tokens: tokens that the packed pages of all requests and the prefix cache may hold; None for 2,048
            for each request that may run, at least one context.
        prefill_tokens: prompt tokens that one step takes at most; fewer make steps shorter, so that requests that
            decode wait less.
        seed: where the seeds of requests without one come from.
    Raises:
        ValueError: a model whose layers are not all full attention, settings or numbers out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        settings: TwilightConfig | dict[str, Any] | str = "balanced",
        max_running: int = 16,
        max_waiting: int = 256,
        max_cache_tokens: int | None = None,
        prefill_tokens: int = 512,
        seed: int = 0,
    ) -> None:
        for name, value in (("max_running", max_running), ("prefill_tokens", prefill_tokens)):
            _require_whole(name, value, 1)
        _require_whole("max_waiting", max_waiting, 0)
        _require_whole("seed", seed, 0)
        self.settings = as_config(settings)
        check_model(model)
        self.model, self.tokenizer = model, tokenizer
        self.context = context_of(model)
        self.max_running, self.max_waiting, self.seed = max_running, max_waiting, seed
        layout = self.settings.layout
        if max_cache_tokens is None:
            max_cache_tokens = max(max_running * _DEFAULT_TOKENS, self.context)
        _require_whole("max_cache_tokens", max_cache_tokens, layout.page_size)
        self.max_cache_tokens = max_cache_tokens
        self._eos = end_tokens(model, tokenizer)
        self._scheduler, self._runner = _build(model, self.settings, max_running, max_cache_tokens, prefill_tokens)
        self._attention = attention_switched(model)
        self._attention.__enter__()
        try:
            with torch.inference_mode():
                probe(model, self._runner)
        except BaseException:
            self._attention.__exit__(None, None, None)
            raise
        self._condition = threading.Condition()
        self._inbox: deque[_Live] = deque()
        self._cancelled: deque[RequestHandle] = deque()
        self._live: dict[RequestHandle, _Live] = {}
        self._by_schedule: dict[ScheduledRequest, _Live] = {}
        self._arrivals = 0
        self._generated = 0
        self._is_closing = False
        self._step_s = 0.0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="twilight-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken; False once closed or dead."""
        return self._thread.is_alive() and not self._is_closing and self.error is None

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
    ) -> RequestHandle:
        """Queue a request and return at once; any thread may call.

        Args:
            prompt: text, tokenized as it stands, or token ids.
            params: how to choose tokens; None for greedy, 128 tokens.
            priority: higher goes first; waiting 32 steps counts as one more.
            request_id: a name of its own; None makes one.
        Raises:
            QueueFull: ``max_waiting`` requests wait.
            EngineClosed: the engine was closed or died.
            ValueError: an empty prompt, one longer than the context or the cache, ids outside the vocabulary.
        """
        params = SamplingParams() if params is None else params
        ids = self._encode(prompt)
        max_tokens = min(params.max_tokens, self.context - len(ids))
        pages = self._scheduler.pages_for(len(ids) + max_tokens)
        if pages > self._scheduler.max_cache_pages:
            raise ValueError(
                f"prompt and max_tokens must fit the cache of {self.max_cache_tokens} tokens, got {len(ids)} + "
                f"{max_tokens}; raise max_cache_tokens or ask for fewer"
            )
        with self._condition:
            self._require_alive()
            waiting = len(self._inbox) + len(self._scheduler.waiting)
            if waiting >= self.max_waiting + max(0, self.max_running - len(self._scheduler.running)):
                raise QueueFull(
                    f"{waiting} requests wait already, at most {self.max_waiting} may; try again later or raise "
                    "max_waiting",
                    retry_after_s=max(1.0, self._step_s * 16),
                )
            self._arrivals += 1
            name = f"request-{self._arrivals}" if request_id is None else request_id
            seed = params.seed if params.seed is not None else (self.seed << 32 | self._arrivals) % (1 << 64)
            handle = RequestHandle(name, self._request_cancel)
            scheduled = ScheduledRequest(name, ids, len(ids), max_tokens, priority)
            stream = TextStream(self.tokenizer, params.stop)
            live = _Live(scheduled, params, handle, stream, seed, time.perf_counter())
            self._inbox.append(live)
            self._live[handle] = live
            self._condition.notify_all()
        return handle

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = True,
    ) -> list[Completion]:
        """Answer all prompts, in their order; more of them than ``max_waiting`` are handed in as room appears.

        Args:
            prompts: texts or token ids.
            params: for all, or one for each.
            progress: whether to show a progress bar on stderr.
        Raises:
            ValueError: as ``submit``; lists of different length.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"params must be one or {len(prompts)} like the prompts, got {len(params)}")
        from tqdm.auto import tqdm

        handles: list[RequestHandle] = []
        done: list[Completion] = []
        try:
            with tqdm(total=len(prompts), desc="requests", disable=not progress) as bar:
                for prompt, one in zip(prompts, params, strict=True):
                    handles.append(self._submit_when_room(prompt, one))
                for handle in handles:
                    done.append(handle.result())
                    bar.update()
        finally:
            for handle in handles:
                handle.cancel()
        return done

    def stats(self) -> EngineStats:
        """Count what was done and is held right now."""
        return collect_stats(self._scheduler, self._runner, len(self._inbox), self._generated)

    def close(self) -> None:
        """Cancel what runs, stop the thread, give the model its attention back; closing twice is fine."""
        with self._condition:
            self._is_closing = True
            self._condition.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _submit_when_room(self, prompt: str | Sequence[int], params: SamplingParams) -> RequestHandle:
        """Submit; where the queue is full, wait until the worker has taken something from it."""
        while True:
            try:
                return self.submit(prompt, params)
            except QueueFull:
                with self._condition:
                    self._condition.wait(timeout=0.1)

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = [int(token) for token in self.tokenizer(prompt)["input_ids"]]
        else:
            ids = [int(token) for token in prompt]
        if not ids:
            raise ValueError("prompt must hold at least one token, got none")
        vocab = vocab_size(self.model)
        if min(ids) < 0 or max(ids) >= vocab:
            raise ValueError(f"token ids must be in [0, {vocab}), got {min(ids)} .. {max(ids)}")
        if len(ids) >= self.context:
            raise ValueError(
                f"prompt must be shorter than the context of {self.context} tokens, got {len(ids)}; shorten it"
            )
        return ids

    def _require_alive(self) -> None:
        if self.error is not None:
            raise EngineClosed(f"the engine died: {self.error}") from self.error
        if self._is_closing or not self._thread.is_alive():
            raise EngineClosed("the engine is closed; make a new one")

    def _request_cancel(self, handle: RequestHandle) -> None:
        with self._condition:
            self._cancelled.append(handle)
            self._condition.notify_all()

    def _work(self) -> None:
        """Run steps until closed. Everything below happens on the worker thread."""
        error: BaseException | None = None
        try:
            with torch.inference_mode():
                while self._take_messages():
                    self._step()
        except BaseException as caught:  # whatever it is, those who wait must hear of it
            error = self.error = caught
            logger.exception("the engine died")
        finally:
            self._attention.__exit__(None, None, None)
            with self._condition:
                self._is_closing = True
                left = list(self._live.values())
            for live in left:
                self._end(live, "cancelled" if error is None else "error", error)

    def _take_messages(self) -> bool:
        """Take new and cancelled requests; wait if there is nothing to do. False if closing."""
        with self._condition:
            scheduler = self._scheduler
            while not (self._inbox or self._cancelled or self._is_closing or scheduler.running or scheduler.waiting):
                self._condition.wait()
            if self._is_closing:
                return False
            arrived, self._inbox = self._inbox, deque()
            cancelled, self._cancelled = self._cancelled, deque()
            for live in arrived:
                self._by_schedule[live.scheduled] = live
                scheduler.add(live.scheduled)
        for handle in cancelled:
            if handle in self._live:
                self._end(self._live[handle], "cancelled")
        return True

    def _step(self) -> None:
        plan = self._scheduler.plan()
        now = time.perf_counter()
        for request in plan.admitted:
            live = self._by_schedule[request]
            live.started = now if live.started is None else live.started
        if not plan.segments:
            return
        try:
            logits = self._runner.run(plan)
        except Exception as error:
            self._after_failure(plan, error)
            return
        self._scheduler.commit(plan)
        self._choose(plan, logits)
        self._step_s = 0.9 * self._step_s + 0.1 * (time.perf_counter() - now)

    def _after_failure(self, plan: StepPlan, error: Exception) -> None:
        """Find out whose fault it was by running each request alone; one that fails alone is to blame."""
        self._scheduler.rollback(plan)
        if len(plan.segments) == 1:
            request = plan.segments[0].request
            logger.warning("request %s failed: %s", request.request_id, error)
            self._end(self._by_schedule[request], "error", error)

    def _choose(self, plan: StepPlan, logits: Tensor) -> None:
        """Choose the next token of every segment that ends where its request does."""
        lives = [self._by_schedule[segment.request] for segment in plan.segments if segment.is_last]
        greedy = [index for index, live in enumerate(lives) if live.params.is_plain_greedy]
        largest = logits.max(-1) if greedy else None
        for index, live in enumerate(lives):
            try:
                if live.params.is_plain_greedy and largest is not None:
                    if not bool(largest.values[index] < torch.inf):
                        raise ValueError("logits must be finite, got NaN or infinity; check the model's dtype")
                    choice = Choice(int(largest.indices[index]))
                else:
                    scheduled = live.scheduled
                    choice = choose(
                        logits[index].clone(), live.params, scheduled.tokens, scheduled.prompt_len, live.seed
                    )
                self._take_token(live, choice)
            except Exception as error:  # a processor's or tokenizer's: this request's own
                self._end(live, "error", error)

    def _take_token(self, live: _Live, choice: Choice) -> None:
        """Add a token to a request and end it if it is the last."""
        live.first_token = time.perf_counter() if live.first_token is None else live.first_token
        scheduled, params = live.scheduled, live.params
        scheduled.tokens.append(choice.token_id)
        self._generated += 1
        if choice.logprob is not None:
            live.logprobs.append(choice.logprob)
            live.top_logprobs.append(choice.top_logprobs)
        text = live.stream.push(choice.token_id)
        reason: FinishReason | None = None
        if live.stream.is_stopped or (choice.token_id in self._eos and not params.ignore_eos):
            reason = "stop"
        elif scheduled.generated >= scheduled.max_tokens:
            reason = "length"
        if reason is not None:
            text += live.stream.finish()
        live.handle._push(Token(choice.token_id, text, choice.logprob, choice.top_logprobs, reason))
        if reason is not None:
            self._end(live, reason)

    def _end(self, live: _Live, reason: FinishReason, error: BaseException | None = None) -> None:
        """Take a request out and tell whoever waits for it."""
        scheduled = live.scheduled
        self._scheduler.finish(scheduled)
        with self._condition:
            self._condition.notify_all()  # there is room in the queue
            self._live.pop(live.handle, None)
            if live in self._inbox:
                self._inbox.remove(live)
        self._by_schedule.pop(scheduled, None)
        if reason == "cancelled":
            live.handle._push(Token(-1, live.stream.finish(), finish_reason=reason))
        since = live.submitted
        live.handle._finish(
            Completion(
                text=live.stream.text,
                token_ids=scheduled.tokens[scheduled.prompt_len :],
                finish_reason=reason,
                prompt_tokens=scheduled.prompt_len,
                cached_tokens=max(0, scheduled.cached_tokens),
                logprobs=live.logprobs,
                top_logprobs=live.top_logprobs,
                timings=Timings(
                    None if live.started is None else live.started - since,
                    None if live.first_token is None else live.first_token - since,
                    time.perf_counter() - since,
                ),
                request_id=scheduled.request_id,
            ),
            error,
        )


def _build(
    model: PreTrainedModel, settings: TwilightConfig, max_running: int, max_cache_tokens: int, prefill_tokens: int
) -> tuple[Scheduler, Runner]:
    """Size the pools and make what works on them."""
    layout = settings.layout
    size = layout.page_size
    cache_pages = -(-max_cache_tokens // size)
    config = model.config.get_text_config(decoder=True)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    is_raw = key_codec(settings, dim).is_raw and value_codec(settings, dim).is_raw
    if is_raw:
        plain, packed = cache_pages + max_running, 0  # and one of sinks for each request
        tree = PrefixTree(layout, PagePool(plain), None)
    else:
        # what requests read and write at a time, and as much again as an eighth of the cache for prefixes
        window = -(-layout.window // size) + 4
        plain = max_running * window + -(-prefill_tokens // size) + max(16, cache_pages // 8)
        packed = cache_pages
        tree = PrefixTree(layout, PagePool(plain), PagePool(packed))
    scheduler = Scheduler(
        tree, max_running=max_running, prefill_tokens=prefill_tokens, max_cache_pages=plain if is_raw else packed
    )
    return scheduler, Runner(model, settings, plain, packed)


def _require_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
