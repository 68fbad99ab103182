"""The engine's requests behind one HTTP request: one for each prompt and choice."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from hf_twilight.engine import Completion, EngineClosed, RequestHandle, Token

from .errors import ApiError

logger = logging.getLogger(__name__)

SERVER_STOPPED = "the server stopped before the answer was complete; try again later"


@dataclass
class Choice:
    """One answer in the making.

    Attributes:
        handle: the engine's request.
        tokens: what came so far.
        times: when each token came, seconds of ``time.perf_counter``.
    """

    handle: RequestHandle
    tokens: list[Token] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    completion: Completion | None = None

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


class Job:
    """Engine requests that live and die together.

    Args:
        handles: the engine's requests, choices of one prompt next to each other.
        prompt_tokens: tokens of each distinct prompt.
        num_choices: choices of each prompt.
    """

    def __init__(self, handles: Sequence[RequestHandle], prompt_tokens: Sequence[int], num_choices: int) -> None:
        self.choices = [Choice(handle) for handle in handles]
        self.started = time.perf_counter()
        self._prompt_tokens = prompt_tokens
        self._num_choices = num_choices

    async def tokens(self) -> AsyncIterator[tuple[int, Token]]:
        """Yield each choice's tokens as they come; leaving early cancels what still runs.

        Raises:
            ApiError: 500 where the engine failed a choice, 503 where it was cancelled from elsewhere.
        """
        arrived: asyncio.Queue[tuple[int, Token | BaseException | None]] = asyncio.Queue()
        pumps = [asyncio.create_task(self._pump(index, arrived)) for index in range(len(self.choices))]
        try:
            running = len(pumps)
            while running:
                index, item = await arrived.get()
                if item is None:
                    running -= 1
                elif isinstance(item, Token):
                    yield index, item
                else:
                    raise item
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self.cancel()

    async def finish(self) -> None:
        """Wait for all choices."""
        async for _ in self.tokens():
            pass

    def cancel(self) -> None:
        """Stop every choice that still runs."""
        for choice in self.choices:
            if choice.completion is None:
                choice.handle.cancel()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the distinct prompts."""
        return sum(self._prompt_tokens)

    @property
    def num_new_tokens(self) -> int:
        """Tokens that came so far, of all choices."""
        return sum(token.token_id >= 0 for choice in self.choices for token in choice.tokens)

    @property
    def is_complete(self) -> bool:
        """Whether every choice came to its own end, by a stop or its length."""
        done = [choice.completion for choice in self.choices]
        return bool(done) and all(one is not None and one.finish_reason in ("stop", "length") for one in done)

    @property
    def usage(self) -> dict[str, object]:
        """OpenAI's usage of a finished job; a prompt counts once, however many choices it has."""
        done = [choice.completion for choice in self.choices if choice.completion is not None]
        generated = sum(len(completion.token_ids) for completion in done)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.num_prompt_tokens + generated,
            "prompt_tokens_details": {
                "cached_tokens": sum(completion.cached_tokens for completion in done[:: self._num_choices])
            },
        }

    async def _pump(self, index: int, arrived: asyncio.Queue[tuple[int, Token | BaseException | None]]) -> None:
        choice = self.choices[index]
        try:
            async for token in choice.handle:
                choice.tokens.append(token)
                choice.times.append(time.perf_counter())
                arrived.put_nowait((index, token))
            choice.completion = await choice.handle
            if choice.completion.finish_reason == "cancelled":
                raise ApiError(503, SERVER_STOPPED, code="cancelled")
            arrived.put_nowait((index, None))
        except ApiError as error:
            arrived.put_nowait((index, error))
        except EngineClosed as error:
            arrived.put_nowait((index, ApiError(503, str(error), code="engine_closed")))
        except Exception as error:  # whatever failed this request in the engine
            logger.warning("request %s failed: %r", choice.handle.request_id, error)
            text = f"the request failed in the engine: {type(error).__name__}: {error}"
            arrived.put_nowait((index, ApiError(500, text, code="engine_error")))
