"""Who answers in ``hf-twilight chat``: a server that speaks OpenAI's API, or a model in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import httpx2

    from hf_twilight.engine import Engine

Messages = Sequence[dict[str, str]]

_CONNECT_S = 5.0


@dataclass(frozen=True)
class Manner:
    """How answers are sampled; None leaves it to the partner.

    Args:
        max_tokens: of an answer.
        temperature: 0 takes the likeliest token.
        seed: of an answer's random numbers.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}")


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer, and how many of its prompt's did not have to be computed."""

    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int


class Partner(Protocol):
    """Someone who answers."""

    name: str
    place: str
    usage: Usage | None

    def answer(self, messages: Messages) -> Iterator[str]:
        """Yield an answer piece by piece; closing the iterator stops it. Sets ``usage`` at the end."""
        ...


class ServerPartner:
    """A server.

    Args:
        url: of the server, with or without ``/v1``.
        model: name of the model; None takes the server's first.
        api_key: sent as a bearer token.
        manner: how answers are sampled.
    Raises:
        ConnectionError: no server there, or it refuses.
    """

    def __init__(self, url: str, model: str | None, api_key: str | None, manner: Manner) -> None:
        import httpx2

        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--url must begin with http:// or https://, got {url!r}")
        base = url.rstrip("/")
        self.place = base if base.endswith("/v1") else f"{base}/v1"
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        timeout = httpx2.Timeout(None, connect=_CONNECT_S)  # a long prompt may take minutes to its first token
        self._client = httpx2.Client(timeout=timeout, headers=headers)
        self._manner = manner
        self.usage: Usage | None = None
        self.name = model or self._first_model()

    def answer(self, messages: Messages) -> Iterator[str]:
        """Yield an answer piece by piece.

        Raises:
            ConnectionError: the server refuses, fails or goes away.
        """
        import httpx2

        manner = {name: value for name, value in vars(self._manner).items() if value is not None}
        body = {"model": self.name, "messages": list(messages), "stream": True, **manner}
        body["stream_options"] = {"include_usage": True}
        self.usage = None
        try:
            with self._client.stream("POST", f"{self.place}/chat/completions", json=body) as response:
                _check(response)
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield from self._piece(json.loads(line.removeprefix("data: ")))
        except httpx2.HTTPError as error:
            raise ConnectionError(f"the server at {self.place} went away: {error}") from error

    def _piece(self, event: dict[str, Any]) -> Iterator[str]:
        if "error" in event:
            raise ConnectionError(event["error"]["message"])
        if usage := event.get("usage"):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            self.usage = Usage(usage["prompt_tokens"], cached, usage["completion_tokens"])
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                yield text

    def _first_model(self) -> str:
        import httpx2

        try:
            response = self._client.get(f"{self.place}/models")
        except httpx2.HTTPError as error:
            raise ConnectionError(
                f"no server answers at {self.place}: {error}; start one with hf-twilight serve"
            ) from error
        _check(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise ConnectionError(f"{self.place}/models must list a model, as OpenAI's API does") from error


class ModelPartner:
    """A model in this process.

    Args:
        engine: runs it; its tokenizer has a chat template.
        name: of the model.
        manner: how answers are sampled.
    Raises:
        ValueError: no chat template.
    """

    def __init__(self, engine: Engine, name: str, manner: Manner) -> None:
        self._tokenizer: Any = engine.tokenizer
        if not self._tokenizer.chat_template:
            raise ValueError(f"{name} must have a chat template to chat, got none; use hf-twilight generate --prompt")
        self.name, self.place = name, "this process"
        self.usage: Usage | None = None
        self._engine, self._manner = engine, manner

    def answer(self, messages: Messages) -> Iterator[str]:
        """Yield an answer piece by piece.

        Raises:
            ValueError: the conversation is longer than the context.
            Exception: what failed the request in the engine.
        """
        from hf_twilight.engine import SamplingParams

        text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        prompt: list[int] = self._tokenizer(str(text), add_special_tokens=False, verbose=False)["input_ids"]
        room = self._engine.context - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens of {self._engine.context}; begin again with /new"
            )
        manner = self._manner
        params = SamplingParams(
            max_tokens=min(room, manner.max_tokens or room), temperature=manner.temperature or 0.0, seed=manner.seed
        )
        handle = self._engine.submit(prompt, params)
        try:
            for token in handle:
                if token.text:
                    yield token.text
            done = handle.result()
        finally:
            handle.cancel()
        self.usage = Usage(done.prompt_tokens, done.cached_tokens, len(done.token_ids))


def _check(response: httpx2.Response) -> None:
    """Raise the server's own words if it refuses."""
    if response.status_code == 200:
        return
    response.read()
    try:
        reason = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        reason = response.text[:200]
    raise ConnectionError(f"the server answers {response.status_code}: {reason}")
