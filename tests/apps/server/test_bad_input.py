"""What is wrong with a request is said in OpenAI's shape, with the right status; the engine never sees it."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}


def _error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"]
    return found


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"model": "\xc3"}',
        b"[" * 50000,
        b'{"model": 1e999999',
        b'{"n": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:16]),
)
def test_body_that_is_no_json(running: Any, body: bytes) -> None:
    response = running.post("/v1/chat/completions", content=body, headers=JSON)
    found = _error(response, 422 if body == b"" else 400)
    assert found["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": "8"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ({"messages": [{"role": "assistant"}]}, "messages.0"),
        ({"model": None}, "model"),
        ({"best_of": 3}, "best_of"),
        ({"functions": []}, "functions"),
        ({"stream_options": {"include_usage": True}}, "body"),
        ({"top_logprobs": 2}, "body"),
        ({"tool_choice": "required"}, "body"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "body"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "body"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "body"),
    ],
    ids=lambda value: str(value)[:50].encode("ascii", "replace").decode(),
)
def test_field_out_of_range(running: Any, change: dict[str, Any], param: str) -> None:
    before = len(running.engine.seen)
    response = running.post("/v1/chat/completions", content=json.dumps(CHAT | change), headers=JSON)
    assert (_error(response, 422)["param"] or "").startswith(param)
    assert len(running.engine.seen) == before


def test_number_that_is_none_is_refused(running: Any) -> None:
    text = json.dumps(CHAT)[:-1]
    for field in ('"temperature": NaN}', '"top_p": Infinity}', '"temperature": 1e400}'):
        error = _error(running.post("/v1/chat/completions", content=f"{text}, {field}", headers=JSON), 422)
        assert error["param"] == field.split('"')[1]


def test_unknown_model_and_path(running: Any) -> None:
    assert _error(running.chat(model="gpt-4"), 404)["code"] == "model_not_found"
    with running.client() as client:
        _error(client.get("/v1/nothing"), 404)
        _error(client.get("/v1/chat/completions"), 405)
        _error(client.get("/v1/models/other"), 404)


def test_prompt_must_fit_the_context(running: Any, start_server: Callable[..., Any]) -> None:
    found = _error(running.chat("x" * 3000), 400)
    assert found["code"] == "context_length_exceeded"
    found = _error(running.chat(max_tokens=2040), 400)
    assert (found["param"], found["code"]) == ("max_tokens", "context_length_exceeded")
    _error(running.post("/v1/completions", json={"model": "tiny", "prompt": ""}), 400)
    with start_server(limits={"max_prompt_tokens": 60, "max_new_tokens": 5, "max_choices": 2}) as small:
        assert "60" in _error(small.chat("x" * 100), 400)["message"]
        assert "at most 5" in _error(small.chat(max_tokens=6), 400)["message"]
        assert "at most 2" in _error(small.chat(n=3, max_tokens=2), 400)["message"]
        assert small.chat("x", max_tokens=None).json()["usage"]["completion_tokens"] <= 5


def test_body_must_be_small_and_json(start_server: Callable[..., Any]) -> None:
    with start_server(limits={"max_body_bytes": 1000}) as running:
        assert running.chat("x").status_code == 200
        _error(running.chat("x" * 2000), 413)
        _error(running.post("/v1/completions", content=iter([b"x" * 600] * 4), headers=JSON), 413)
        _error(running.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}), 415)
        assert running.chat("x").status_code == 200


def test_key_is_asked_for(start_server: Callable[..., Any]) -> None:
    with start_server(api_key="secret") as running:
        response = running.chat()
        assert _error(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        body = {**CHAT, "max_tokens": 2}
        for key, status in [("Bearer wrong", 401), ("secret", 401), ("Bearer sécret", 401), ("bearer secret", 200)]:
            headers = {"authorization": key.encode()}
            assert running.post("/v1/chat/completions", json=body, headers=headers).status_code == status
        with running.client() as client:
            assert client.get("/health").status_code == 200
            assert client.get("/v1/models").status_code == 401


def test_full_queue_is_429_and_leaves_nothing_behind(start_server: Callable[..., Any]) -> None:
    with start_server(capacity=2, token_s=0.02) as running:
        response = running.chat(n=3)
        assert _error(response, 429)["code"] == "queue_full"
        assert response.headers["retry-after"] == "3"
        running.wait_idle()
        assert running.chat(n=2).status_code == 200


def test_fault_in_the_engine_fails_that_request(start_server: Callable[..., Any]) -> None:
    with start_server() as running:
        running.engine.fault = RuntimeError("broken")
        assert "broken" in _error(running.chat(), 500)["message"]
        with running.client() as client:
            body = {**CHAT, "stream": True}
            lines = [line for line in client.post("/v1/chat/completions", json=body).text.splitlines() if line]
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "engine_error"
        assert lines[-1] == "data: [DONE]"
        with running.client() as client:
            assert 'request_success_total{finished_reason="error",model_name="tiny"} 2.0' in client.get("/metrics").text
        running.engine.fault = None
        assert running.chat().status_code == 200


def test_dead_engine_is_503(start_server: Callable[..., Any]) -> None:
    with start_server() as running:
        running.engine.is_alive, running.engine.error = False, RuntimeError("out of memory")
        assert "out of memory" in _error(running.chat(), 503)["message"]
        with running.client() as client:
            assert client.get("/health").status_code == 503


def test_garbage_on_the_wire_does_not_stop_the_server(running: Any) -> None:
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions\r\n\r\n",
        b"\x00" * 70000,
    ):
        with socket.create_connection(("127.0.0.1", running.port), timeout=5) as raw:
            raw.sendall(garbage)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(4096):
                pass
    assert running.chat().status_code == 200
