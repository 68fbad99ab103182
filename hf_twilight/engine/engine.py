"""The engine: many requests, one model, shared prefixes, one worker thread that owns model and pages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twilight_cache import PagePool, PrefixTree
from twilight_kernels import release_threads

from ..attention import ATTENTION_NAME, use_attention
from ..config import TwilightConfig, as_config
from ..signature import require_fit
from .eligibility import check_model, context_of, end_tokens, layer_shapes, probe, vocab_size
from .handle import Completion, RequestHandle
from .plan import ScheduledRequest
from .runner import Runner, layer_codecs
from .sampling import SamplingParams
from .scheduler import Scheduler
from .stats import EngineStats, collect_stats
from .text import TextStream
from .worker import Live, Worker

_DEFAULT_TOKENS = 2048  # of cache for each request that may run, where nobody says how many


class QueueFull(RuntimeError):
    """Too many requests wait already; ``retry_after_s`` guesses when one will have left."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineClosed(RuntimeError):
    """The engine was closed, or died of the error that is this one's cause."""


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
        decoder = model.config.get_text_config(decoder=True)
        require_fit(self.settings, decoder, decoder.num_hidden_layers)
        if self.settings.skvq_tables is not None:
            raise ValueError("the engine decodes from pages: skvq_tables must be None; use generate for SKVQ")
        if self.settings.selector != "full":
            raise ValueError(
                f"the engine scores every packed token: selector must be 'full', got {self.settings.selector!r}; "
                "change it, or use model.generate"
            )
        check_model(model)
        self.model, self.tokenizer = model, tokenizer
        self.context = context_of(model)
        self.max_running, self.max_waiting, self.seed = max_running, max_waiting, seed
        layout = self.settings.layout
        if max_cache_tokens is None:
            max_cache_tokens = max(max_running * _DEFAULT_TOKENS, self.context)
        _require_whole("max_cache_tokens", max_cache_tokens, layout.page_size)
        self.max_cache_tokens = max_cache_tokens
        attention = use_attention(model, ATTENTION_NAME)
        attention.__enter__()
        try:
            with torch.inference_mode():
                self._scheduler, self._runner = _build(
                    model, self.settings, max_running, max_cache_tokens, prefill_tokens
                )
                probe(model, self._runner)
        except BaseException:
            attention.__exit__(None, None, None)
            raise
        self._arrivals = 0
        self._worker = Worker(
            self._scheduler, self._runner, end_tokens(model, tokenizer), lambda: attention.__exit__(None, None, None)
        )

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken; False once closed or dead."""
        worker = self._worker
        return worker.thread.is_alive() and not worker.is_closing and worker.error is None

    @property
    def error(self) -> BaseException | None:
        """What the engine died of, if it did."""
        return self._worker.error

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
        worker = self._worker
        if self.model.device.type == "cpu" and not worker.live:
            release_threads()  # from here on the worker computes, whatever this thread did before
        with worker.condition:
            self._require_alive()
            waiting = worker.num_waiting
            if waiting >= self.max_waiting + max(0, self.max_running - len(self._scheduler.running)):
                raise QueueFull(
                    f"{waiting} requests wait already, at most {self.max_waiting} may; try again later or raise "
                    "max_waiting",
                    retry_after_s=max(1.0, worker.step_s * 16),
                )
            self._arrivals += 1
            name = f"request-{self._arrivals}" if request_id is None else request_id
            seed = params.seed if params.seed is not None else (self.seed << 32 | self._arrivals) % (1 << 64)
            handle = RequestHandle(name, worker.cancel)
            scheduled = ScheduledRequest(name, ids, len(ids), max_tokens, priority)
            stream = TextStream(self.tokenizer, params.stop)
            worker.post(Live(scheduled, params, handle, stream, seed, time.perf_counter()))
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
        return collect_stats(self._scheduler, self._runner, len(self._worker.inbox), self._worker.generated)

    def close(self) -> None:
        """Cancel what runs, stop the thread, give the model its attention back; closing twice is fine."""
        self._worker.close()

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
                with self._worker.condition:
                    self._worker.condition.wait(timeout=0.1)

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
        if not self.is_alive:
            raise EngineClosed("the engine is closed; make a new one")


def _build(
    model: PreTrainedModel, settings: TwilightConfig, max_running: int, max_cache_tokens: int, prefill_tokens: int
) -> tuple[Scheduler, Runner]:
    """Size the pools and make what works on them."""
    layout = settings.layout
    size = layout.page_size
    cache_pages = -(-max_cache_tokens // size)
    shapes = layer_shapes(model)
    pairs = [layer_codecs(settings, shapes, layer) for layer in range(len(shapes))]
    is_raw = all(codec.is_raw for codec in pairs[0])
    if any(all(codec.is_raw for codec in pair) != is_raw for pair in pairs):
        raise ValueError("layers must be raw (16 bits) all or none in the engine, got a mixture; change their bits")
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
    return scheduler, Runner(model, settings, shapes, plain, packed)


def _require_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
