"""What a caller holds of a request: its tokens as they come, its result, a way to stop it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        token_id: its id; -1 for the end of a cancelled request, with the text that was held back.
        text: text that became certain with it, possibly empty.
        logprob: log-probability under the model, before temperature and penalties; None unless asked for.
        top_logprobs: likeliest ids with theirs.
        finish_reason: why the answer ends here; None if it goes on.
    """

    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Timings:
    """Seconds from submission to admission, to the first token, and to the end; None if it never came to that."""

    queued_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer.

    Attributes:
        text: without the stop text and special tokens.
        token_ids: generated ids, the end token included.
        finish_reason: ``"stop"``, ``"length"``, ``"cancelled"`` or ``"error"``.
        prompt_tokens: ids of the prompt.
        cached_tokens: of those, found stored.
        logprobs: one for each token; empty unless asked for.
        top_logprobs: likeliest ids with theirs, for each token.
        timings: how long it took.
        request_id: name of the request.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    request_id: str = ""


class RequestHandle:
    """One request: iterate (also ``async for``) for its tokens, ``result()`` or ``await`` for the whole.

    Several may read at a time; each sees every token. A reader that does not read holds nobody up.
    """

    def __init__(self, request_id: str, cancel: Callable[[RequestHandle], None]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._lock = threading.Lock()
        self._tokens: list[Token] = []
        self._completion: Completion | None = None
        self._error: BaseException | None = None
        self._wakers: list[Callable[[], Any]] = []

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self._completion is not None

    @property
    def error(self) -> BaseException | None:
        """What made the request fail, if it did."""
        return self._error

    def cancel(self) -> None:
        """Stop it; what was generated stays readable. Does nothing once it is finished."""
        if not self.is_finished:
            self._cancel(self)

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end.

        Args:
            timeout: seconds; None waits forever.
        Raises:
            TimeoutError: it is not finished by then.
            Exception: what made the request fail.
        """
        end = None if timeout is None else time.monotonic() + timeout
        changed = threading.Event()
        while not self._wake_when(lambda: self.is_finished, changed.set):
            if not changed.wait(None if end is None else max(0.0, end - time.monotonic())):
                raise TimeoutError(f"request {self.request_id} did not finish within {timeout} s; cancel() stops it")
            changed.clear()
        return self._outcome()

    def __iter__(self) -> Iterator[Token]:
        """Yield tokens as they come; raise what made the request fail."""
        index, ready = 0, threading.Event()
        while True:
            ready.clear()
            if not self._wake_when(partial(self._has, index), ready.set):
                ready.wait()
            while index < len(self._tokens):
                yield self._tokens[index]
                index += 1
            if self.is_finished and index == len(self._tokens):
                if self._error is not None:
                    raise self._error
                return

    async def __aiter__(self) -> AsyncIterator[Token]:
        """Yield tokens as they come; raise what made the request fail."""
        index, ready = 0, asyncio.Event()
        loop = asyncio.get_running_loop()
        while True:
            ready.clear()
            if not self._wake_when(partial(self._has, index), _in_loop(loop, ready.set)):
                await ready.wait()
            while index < len(self._tokens):
                yield self._tokens[index]
                index += 1
            if self.is_finished and index == len(self._tokens):
                if self._error is not None:
                    raise self._error
                return

    def __await__(self) -> Generator[Any, None, Completion]:
        """Wait for the whole answer."""
        return self._wait().__await__()

    async def _wait(self) -> Completion:
        async for _ in self:
            pass
        return self._outcome()

    def _outcome(self) -> Completion:
        if self._error is not None:
            raise self._error
        assert self._completion is not None
        return self._completion

    def _has(self, index: int) -> bool:
        """Whether token ``index``, or the end, is there."""
        return len(self._tokens) > index or self.is_finished

    def _wake_when(self, is_ready: Callable[[], bool], wake: Callable[[], Any]) -> bool:
        """Return whether it is ready; if not, have ``wake`` called once when something has changed."""
        with self._lock:
            if is_ready():
                return True
            self._wakers.append(wake)
            return False

    def _push(self, token: Token) -> None:
        """Engine: add a token."""
        with self._lock:
            self._tokens.append(token)
            wakers, self._wakers = self._wakers, []
        for wake in wakers:
            wake()

    def _finish(self, completion: Completion, error: BaseException | None = None) -> None:
        """Engine: add the end."""
        with self._lock:
            if self._completion is not None:
                return
            self._error, self._completion = error, completion
            wakers, self._wakers = self._wakers, []
        for wake in wakers:
            wake()


def _in_loop(loop: asyncio.AbstractEventLoop, wake: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(wake)

    return call
