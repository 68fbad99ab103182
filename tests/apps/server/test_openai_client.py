"""The ``openai`` client and ``curl``, unmodified."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
MESSAGES: Any = [{"role": "user", "content": "hello"}]


class Animal(BaseModel):
    """What the answer must be."""

    kind: Literal["cat", "dog"]
    legs: int


@pytest.fixture
def client(running: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, seed=1)
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=8, seed=1, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 8


def test_parse_returns_the_model(client: openai.OpenAI) -> None:
    done = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Animal, max_tokens=200)
    assert isinstance(done.choices[0].message.parsed, Animal)


def test_tools_make_a_round_trip(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[TOOL], tool_choice="required", max_tokens=400,
        extra_body={"parallel_tool_calls": False},
    )  # fmt: skip
    message = first.choices[0].message
    assert message.tool_calls
    call: Any = message.tool_calls[0]
    assert set(json.loads(call.function.arguments)) == {"a", "b"}
    answer = {"role": "tool", "tool_call_id": call.id, "content": "3"}
    second = client.chat.completions.create(
        model="tiny", messages=[*MESSAGES, message, answer], tools=[TOOL], tool_choice="none", max_tokens=8
    )
    assert second.choices[0].message.content


def test_errors_are_the_clients_own(client: openai.OpenAI, start_server: Callable[..., Any]) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.UnprocessableEntityError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    with start_server(api_key="secret", capacity=1) as guarded:
        with pytest.raises(openai.AuthenticationError):
            client.with_options(base_url=f"{guarded.url}/v1").models.list()
        known = client.with_options(base_url=f"{guarded.url}/v1", api_key="secret")
        assert [model.id for model in known.models.list()] == ["tiny"]
        with pytest.raises(openai.RateLimitError):
            known.chat.completions.create(model="tiny", messages=MESSAGES, n=2)


def test_text_completion(client: openai.OpenAI) -> None:
    done = client.completions.create(model="tiny", prompt="hello", max_tokens=4, logprobs=1)
    assert done.choices[0].logprobs is not None
    assert len(done.choices[0].logprobs.tokens or []) == 4


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(running: Any) -> None:
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "stream": True})
    done = subprocess.run(
        ["curl", "-sN", f"{running.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True, text=True, check=True, timeout=20,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) == 1 + 4 + 1 + 1  # role, tokens, finish, done
