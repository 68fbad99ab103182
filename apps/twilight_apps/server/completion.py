"""``POST /v1/completions``."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from anyio import to_thread

from hf_twilight.engine import Token

from .jobs import Job
from .logprobs import completion_logprobs
from .schemas import CompletionRequest
from .service import Service

# OpenAI's, where a request names no max_tokens
_MAX_TOKENS = 16


@dataclass
class TextCompletion:
    """One completion.

    Args:
        service: serves it.
        request: what was asked.
        job: the engine's requests.
        echoes: what stands before the answers to each prompt.
    """

    service: Service
    request: CompletionRequest
    job: Job
    echoes: Sequence[str]

    def __post_init__(self) -> None:
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.service.name,
            "system_fingerprint": None,
        }

    @classmethod
    async def begin(cls, service: Service, request: CompletionRequest, request_id: str) -> TextCompletion:
        """Check, tokenize and submit a request.

        Raises:
            ApiError: it is refused.
        """
        service.check_ready(request.model)
        prompts, echoes = await to_thread.run_sync(_prepare, service, request)
        budget = service.token_budget(prompts, request.max_tokens, default=_MAX_TOKENS)
        return cls(
            service, request, service.start(request, prompts, budget, request.logprobs, None, request_id), echoes
        )

    async def whole(self) -> dict[str, Any]:
        """Wait for the answers and return the response's object."""
        try:
            await self.job.finish()
        finally:
            self.service.finish(self.job)
        choices = []
        for index, choice in enumerate(self.job.choices):
            assert choice.completion is not None
            text = self._echo(index) + choice.text
            choices.append(self._choice(index, text, choice.tokens, 0, choice.completion.finish_reason))
        return {**self._head, "choices": choices, "usage": self.job.usage}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of a streamed answer."""
        options = self.request.stream_options
        wants_usage = options is not None and options.include_usage
        usage: dict[str, None] = {"usage": None} if wants_usage else {}
        sent = [0] * len(self.job.choices)
        try:
            for index in range(len(sent)):
                if self._echo(index):
                    yield {**self._head, "choices": [self._choice(index, self._echo(index), [], 0, None)], **usage}
            async for index, token in self.job.tokens():
                reason = token.finish_reason if token.finish_reason in ("stop", "length") else None
                if token.text or reason or self.request.logprobs is not None:
                    choice = self._choice(index, token.text, [token], sent[index], reason)
                    yield {**self._head, "choices": [choice], **usage}
                sent[index] += len(token.text)
        finally:
            self.service.finish(self.job)
        if wants_usage:
            yield {**self._head, "choices": [], "usage": self.job.usage}

    def _echo(self, index: int) -> str:
        return self.echoes[index // (self.request.n or 1)] if self.echoes else ""

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token], offset: int, reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs is not None:
            logprobs = completion_logprobs(tokens, offset, self.service.vocabulary)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _prepare(service: Service, request: CompletionRequest) -> tuple[list[list[int]], list[str]]:
    """Return the prompts' tokens and, for ``echo``, their texts; runs on a worker thread."""
    given = request.prompts
    service.check_tokens(request, [prompt for prompt in given if not isinstance(prompt, str)])
    if request.logprobs is not None:
        service.vocabulary.prepare()
    words = service.prompts
    tokens = [words.tokens(prompt) if isinstance(prompt, str) else prompt for prompt in given]
    if not request.echo:
        return tokens, []
    return tokens, [prompt if isinstance(prompt, str) else words.text(prompt) for prompt in given]
