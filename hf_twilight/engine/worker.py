"""The thread that owns the model and its pages: takes requests in, runs steps, hands tokens out."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .handle import Completion, FinishReason, RequestHandle, Timings, Token
from .plan import ScheduledRequest, StepPlan
from .runner import Runner
from .sampling import Choice, SamplingParams, choose
from .scheduler import Scheduler
from .text import TextStream

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Live:
    """A request as the worker sees it."""

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


class Worker:
    """Run steps until closed. Only ``post``, ``cancel`` and ``close`` may be called by other threads.

    Args:
        scheduler: decides.
        runner: computes.
        end_tokens: ids that end an answer.
        on_end: called on the thread when it ends.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, end_tokens: frozenset[int], on_end: Callable[[], object]
    ) -> None:
        self.scheduler, self.runner, self._eos, self._on_end = scheduler, runner, end_tokens, on_end
        self.condition = threading.Condition()
        self.inbox: deque[Live] = deque()
        self.cancelled: deque[RequestHandle] = deque()
        self.live: dict[RequestHandle, Live] = {}
        self.by_schedule: dict[ScheduledRequest, Live] = {}
        self.generated = 0
        self.step_s = 0.0  # running mean
        self.is_closing = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="twilight-engine", daemon=True)
        self.thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that are not running yet."""
        return len(self.inbox) + len(self.scheduler.waiting)

    def post(self, live: Live) -> None:
        """Hand a request over; the condition must be held."""
        self.inbox.append(live)
        self.live[live.handle] = live
        self.condition.notify_all()

    def cancel(self, handle: RequestHandle) -> None:
        """Ask for a request to be stopped."""
        with self.condition:
            self.cancelled.append(handle)
            self.condition.notify_all()

    def close(self) -> None:
        """Ask the thread to end, and wait for it."""
        with self.condition:
            self.is_closing = True
            self.condition.notify_all()
        if threading.current_thread() is not self.thread:
            self.thread.join()

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
            self._on_end()
            with self.condition:
                self.is_closing = True
                left = list(self.live.values())
            for live in left:
                self._end(live, "cancelled" if error is None else "error", error)

    def _take_messages(self) -> bool:
        """Take new and cancelled requests; wait if there is nothing to do. False if closing."""
        with self.condition:
            scheduler = self.scheduler
            while not (self.inbox or self.cancelled or self.is_closing or scheduler.running or scheduler.waiting):
                self.condition.wait()
            if self.is_closing:
                return False
            arrived, self.inbox = self.inbox, deque()
            cancelled, self.cancelled = self.cancelled, deque()
            for live in arrived:
                self.by_schedule[live.scheduled] = live
                scheduler.add(live.scheduled)
        for handle in cancelled:
            if handle in self.live:
                self._end(self.live[handle], "cancelled")
        return True

    def _step(self) -> None:
        plan = self.scheduler.plan()
        now = time.perf_counter()
        for request in plan.admitted:
            live = self.by_schedule[request]
            live.started = now if live.started is None else live.started
        if not plan.segments:
            return
        try:
            logits = self.runner.run(plan)
        except Exception as error:
            self._after_failure(plan, error)
            return
        self.scheduler.commit(plan)
        self._choose(plan, logits)
        self.step_s = 0.9 * self.step_s + 0.1 * (time.perf_counter() - now)

    def _after_failure(self, plan: StepPlan, error: Exception) -> None:
        """Find out whose fault it was by running each request alone; one that fails alone is to blame."""
        self.scheduler.rollback(plan)
        if len(plan.segments) == 1:
            request = plan.segments[0].request
            logger.warning("request %s failed: %s", request.request_id, error)
            self._end(self.by_schedule[request], "error", error)

    def _choose(self, plan: StepPlan, logits: Tensor) -> None:
        """Choose the next token of every segment that ends where its request does."""
        lives = [self.by_schedule[segment.request] for segment in plan.segments if segment.is_last]
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

    def _take_token(self, live: Live, choice: Choice) -> None:
        """Add a token to a request and end it if it is the last."""
        live.first_token = time.perf_counter() if live.first_token is None else live.first_token
        scheduled, params = live.scheduled, live.params
        scheduled.tokens.append(choice.token_id)
        self.generated += 1
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

    def _end(self, live: Live, reason: FinishReason, error: BaseException | None = None) -> None:
        """Take a request out and tell whoever waits for it."""
        scheduled = live.scheduled
        self.scheduler.finish(scheduled)
        with self.condition:
            self.condition.notify_all()  # there is room in the queue
            self.live.pop(live.handle, None)
            if live in self.inbox:
                self.inbox.remove(live)
        self.by_schedule.pop(scheduled, None)
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
