"""``POST /v1/chat/completions``."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from anyio import to_thread

from hf_twilight.engine import Token

from . import tools
from .grammar import Grammar
from .jobs import Job
from .logprobs import chat_logprobs
from .schemas import ChatRequest, JsonObject, JsonSchema
from .service import Service


@dataclass
class Chat:
    """One chat completion.

    Args:
        service: serves it.
        request: what was asked.
        job: the engine's requests.
    """

    service: Service
    request: ChatRequest
    job: Job

    def __post_init__(self) -> None:
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.service.name,
            "system_fingerprint": None,
        }

    @classmethod
    async def begin(cls, service: Service, request: ChatRequest, request_id: str) -> Chat:
        """Check, render, tokenize and submit a request.

        Raises:
            ApiError: it is refused.
        """
        service.check_ready(request.model)
        prompt, grammar = await to_thread.run_sync(_prepare, service, request)
        asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        budget = service.token_budget([prompt], asked, default=None)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return cls(service, request, service.start(request, [prompt], budget, logprobs, grammar, request_id))

    async def whole(self) -> dict[str, Any]:
        """Wait for the answer and return the response's object."""
        try:
            await self.job.finish()
        finally:
            self.service.finish(self.job)
        choices = [self._choice(index) for index in range(len(self.job.choices))]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self.job.usage}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of a streamed answer."""
        readers = [tools.CallReader() for _ in self.job.choices]
        try:
            for index in range(len(readers)):
                yield self._chunk(index, {"role": "assistant", "content": ""})
            async for index, token in self.job.tokens():
                for chunk in self._chunks(index, token, readers[index]):
                    yield chunk
        finally:
            self.service.finish(self.job)
        if self._wants_usage:
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self.job.usage}

    @property
    def _wants_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and options.include_usage

    def _choice(self, index: int) -> dict[str, Any]:
        choice = self.job.choices[index]
        assert choice.completion is not None
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        reason: str | None = choice.completion.finish_reason
        if self.request.can_call_tools:
            reader = tools.CallReader()
            found = reader.feed(choice.text) + reader.finish()
            message["content"] = "".join(part for part in found if isinstance(part, str)) or None
            if reader.calls:
                message["tool_calls"] = [_called(call) for call in reader.calls]
                reason = "tool_calls" if reason == "stop" else reason
            else:
                message["content"] = choice.text
        return {
            "index": index,
            "message": message,
            "finish_reason": reason,
            "logprobs": chat_logprobs(choice.tokens, self.service.vocabulary) if self.request.logprobs else None,
        }

    def _chunks(self, index: int, token: Token, reader: tools.CallReader) -> list[dict[str, Any]]:
        """Return the chunks that one token makes: its text, the calls it completes, the end."""
        parts: list[str | tools.Call] = [token.text] if token.text else []
        if self.request.can_call_tools:
            parts = reader.feed(token.text)
            if token.finish_reason is not None:
                parts += reader.finish()
        chunks = []
        num_calls = len(reader.calls) - sum(isinstance(part, tools.Call) for part in parts)
        for part in parts:
            if isinstance(part, str):
                chunks.append(self._chunk(index, {"content": part}))
            else:
                chunks.append(self._chunk(index, {"tool_calls": [{"index": num_calls, **_called(part)}]}))
                num_calls += 1
        if self.request.logprobs:
            chunks = chunks or [self._chunk(index, {})]
            chunks[0]["choices"][0]["logprobs"] = chat_logprobs([token], self.service.vocabulary)
        if token.finish_reason in ("stop", "length"):
            is_call = bool(reader.calls) and token.finish_reason == "stop"
            chunks.append(self._chunk(index, {}, "tool_calls" if is_call else token.finish_reason))
        return chunks

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}
        usage: dict[str, None] = {"usage": None} if self._wants_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage}


def _prepare(service: Service, request: ChatRequest) -> tuple[list[int], Grammar | None]:
    """Return the prompt and what the answer may be; runs on a worker thread."""
    service.check_tokens(request, [])
    if request.logprobs:
        service.vocabulary.prepare()
    prompt = service.prompts.chat(request)
    wanted = request.response_format
    if isinstance(wanted, JsonSchema):
        return prompt, service.vocabulary.json_grammar(wanted.json_schema.schema_)
    if isinstance(wanted, JsonObject):
        return prompt, service.vocabulary.json_grammar({"type": "object"})
    return prompt, tools.grammar(request, service.vocabulary) if request.can_call_tools else None


def _called(call: tools.Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
