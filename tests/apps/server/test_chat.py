"""Chat completions over a socket."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer"}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["count", "kind"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def _events(running: Any, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "stream": True}
    with running.client() as client, client.stream("POST", "/v1/chat/completions", json=body | fields) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_stream_says_what_the_whole_answer_says(running: Any) -> None:
    whole = running.chat(n=2, seed=3).json()
    events = _events(running, n=2, seed=3, stream_options={"include_usage": True})
    for index in range(2):
        deltas = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(delta["delta"].get("content", "") for delta in deltas)
        assert text == whole["choices"][index]["message"]["content"] != ""
        assert [delta["finish_reason"] for delta in deltas if delta["finish_reason"]] == ["length"]
    assert len({choice["message"]["content"] for choice in whole["choices"]}) == 2  # seeds differ
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 16
    assert all(event["usage"] is None for event in events[:-1])


def test_usage_counts_the_prompt_once_and_tells_cached_tokens(running: Any) -> None:
    running.chat("the same words")
    usage = running.chat("the same words", n=3).json()["usage"]
    assert usage["completion_tokens"] == 24
    assert usage["total_tokens"] == usage["prompt_tokens"] + 24
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]


def test_stop_ends_the_answer(running: Any) -> None:
    text = running.chat().json()["choices"][0]["message"]["content"]
    choice = running.chat(stop=[text[3]]).json()["choices"][0]
    assert choice["message"]["content"] == text.split(text[3])[0]
    assert choice["finish_reason"] == "stop"


def test_logprobs_belong_to_the_tokens(running: Any) -> None:
    choice = running.chat(logprobs=True, top_logprobs=3).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == choice["message"]["content"]
    for entry in entries:  # greedy: the first alternative is the token
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] <= 0
    streamed = [event["choices"][0]["logprobs"] for event in _events(running, logprobs=True, top_logprobs=3)]
    assert [entry for found in streamed if found for entry in found["content"]] == entries


def test_logit_bias_and_penalties_reach_the_engine(running: Any, tokenizer: Any) -> None:
    letter = tokenizer("q")["input_ids"][0]
    only = running.chat(logit_bias={str(letter): 100}).json()["choices"][0]["message"]["content"]
    assert only == "q" * 8
    varied = running.chat(logit_bias={str(letter): 4}, frequency_penalty=2, presence_penalty=2).json()
    assert varied["choices"][0]["message"]["content"].count("q") < 8


def test_json_schema_is_kept(running: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "animals", "schema": SCHEMA, "strict": True}}
    choice = running.chat(response_format=wanted, max_tokens=200).json()["choices"][0]
    found = json.loads(choice["message"]["content"])
    assert isinstance(found["count"], int)
    assert found["kind"] in ("cat", "dog")
    assert choice["finish_reason"] == "stop"


def test_json_object_is_json(running: Any) -> None:
    content = running.chat(response_format={"type": "json_object"}, max_tokens=400, logit_bias={}).json()
    choice = content["choices"][0]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 5, "maximum": 1},
        {"type": "array", "minItems": 3, "maxItems": 2},
        {"enum": []},
        False,
        {"type": "string", "pattern": "("},
        {"not": {}},
        {"$ref": "#/nowhere"},
    ],
    ids=str,
)
def test_schema_that_cannot_be_met_is_refused(running: Any, schema: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = running.chat(response_format=wanted)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_schema"
    assert response.json()["error"]["param"] == "response_format"
    assert not running.engine.live


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_required_tool_is_called_with_fitting_arguments(running: Any, choice: Any) -> None:
    fields = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200}
    found = running.chat(**fields).json()["choices"][0]
    (call,) = found["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert set(json.loads(call["function"]["arguments"])) == {"city"}
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] is None
    deltas = [event["choices"][0]["delta"] for event in _events(running, **fields)]
    (streamed,) = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert streamed["index"] == 0
    assert streamed["function"] == call["function"]
    assert not any(delta.get("content") for delta in deltas)


def test_model_may_call_or_talk(start_server: Callable[..., Any]) -> None:
    said = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    with start_server(script=said) as running:
        choice = running.chat(tools=[WEATHER, CLOCK], max_tokens=200).json()["choices"][0]
        assert choice["message"]["content"] == "Let me see."
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
        silent = running.chat(tools=[WEATHER], tool_choice="none", max_tokens=200).json()["choices"][0]
        assert silent["message"]["content"] == said
        assert "tool_calls" not in silent["message"]
    with start_server(script="It is sunny.") as running:
        choice = running.chat(tools=[WEATHER], max_tokens=200).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("It is sunny.", "stop")


def test_call_outside_its_schema_cannot_be_written(start_server: Callable[..., Any]) -> None:
    said = '<tool_call>\n{"name": "weather", "arguments": {"town": "Rome"}}\n</tool_call>'
    with start_server(script=said) as running:
        choice = running.chat(tools=[WEATHER], max_tokens=300).json()["choices"][0]
        for call in choice["message"].get("tool_calls", []):
            assert set(json.loads(call["function"]["arguments"])) == {"city"}


def test_conversation_with_tools_is_rendered(running: Any, tokenizer: Any) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "clock", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "noon", "tool_call_id": "c"},
    ]
    assert running.chat(messages=messages, tools=[CLOCK]).status_code == 200
    prompt = tokenizer.decode(running.engine.seen[-1].prompt)
    for part in ("Be short.", '"name": "clock"', "<tool_call>", "<tool_response>\nnoon"):
        assert part in prompt
    assert prompt.endswith("<|im_start|>assistant\n")


def test_model_without_tools_in_its_template_says_so(start_server: Callable[..., Any], tokenizer: Any) -> None:
    from twilight_apps.server.prompts import Prompts

    with start_server() as running:
        running.service.prompts = Prompts(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}")
        error = running.chat(tools=[CLOCK]).json()["error"]
        assert error["code"] == "no_tool_template"
        assert "--chat-template" in error["message"]
        running.service.prompts = Prompts(tokenizer)
        assert running.chat().json()["error"]["code"] == "no_chat_template"
        running.service.prompts = Prompts(tokenizer, "{{ raise_exception('roles must alternate') }}")
        response = running.chat()
        assert response.status_code == 400
        assert "roles must alternate" in response.json()["error"]["message"]


def test_request_id_is_echoed(running: Any) -> None:
    with running.client() as client:
        response = client.get("/v1/models", headers={"X-Request-ID": "my-id"})
        assert response.headers["x-request-id"] == "my-id"
        bad = client.get("/v1/models", headers={"X-Request-ID": "a b\tc"})
        assert bad.headers["x-request-id"] not in ("a b\tc", "")
