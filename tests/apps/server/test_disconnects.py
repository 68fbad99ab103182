"""Clients that leave, or do not read: their requests are cancelled, others go on."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest


def _raw(running: Any, **fields: Any) -> tuple[socket.socket, bytes]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1000, **fields}
    data = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return socket.create_connection(("127.0.0.1", running.port), timeout=5), head.encode() + data


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["connected", "headers", "half the body", "whole body", "first bytes"])
def test_client_that_leaves_cancels_its_request(start_server: Callable[..., Any], stage: str, stream: bool) -> None:
    with start_server(token_s=0.005) as running:
        raw, data = _raw(running, stream=stream, ignore_eos=True, n=2)
        cut = {"connected": 0, "headers": data.index(b"\r\n\r\n") + 4, "half the body": len(data) - 20}
        raw.sendall(data[: cut.get(stage, len(data))])
        if stage in ("whole body", "first bytes"):
            while len(running.engine.live) < 2:
                time.sleep(0.002)
        if stage == "first bytes" and stream:
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
        raw.close()
        running.wait_idle(2.0)
        assert all(handle.is_cancelled for handle in running.engine.seen)
        assert running.chat(max_tokens=2).status_code == 200


def test_neighbours_of_a_client_that_leaves_get_their_answers(start_server: Callable[..., Any]) -> None:
    with start_server(token_s=0.003) as running:
        alone = running.chat("hello", max_tokens=40, ignore_eos=True).json()["choices"]
        raw, data = _raw(running, stream=True)
        raw.sendall(data)
        answers: list[Any] = []
        other = threading.Thread(
            target=lambda: answers.append(running.chat("hello", max_tokens=40, ignore_eos=True).json()["choices"])
        )
        other.start()
        time.sleep(0.03)
        raw.close()
        other.join(5)
        assert answers == [alone]


def test_client_that_never_reads_is_dropped(start_server: Callable[..., Any]) -> None:
    with start_server(limits={"stall_s": 0.3}) as running:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", running.port))
        _, data = _raw(running, stream=True, n=16, ignore_eos=True, max_tokens=1900, logprobs=True, top_logprobs=20)
        raw.sendall(data)
        while not running.engine.live:
            time.sleep(0.002)
        running.wait_idle(20.0)
        assert any(handle.is_cancelled for handle in running.engine.seen)
        assert running.chat(max_tokens=2).status_code == 200
        raw.close()


def test_body_that_does_not_arrive_times_out(start_server: Callable[..., Any]) -> None:
    with start_server(limits={"body_s": 0.2}) as running:
        raw, data = _raw(running)
        with raw:
            raw.sendall(data[:-5])
            assert raw.recv(4096).startswith(b"HTTP/1.1 408")


def test_stopping_server_lets_requests_finish_and_refuses_new_ones(start_server: Callable[..., Any]) -> None:
    with start_server(token_s=0.005, limits={"drain_s": 5.0}) as running:
        with running.client() as client:
            assert client.get("/health").status_code == 200
            body = {"model": "tiny", "prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                running.service.is_draining = True
                assert running.chat().status_code == 503
                assert running.post("/health").status_code in (405, 503)
                running.server.should_exit = True
                rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]


def test_drain_ends_after_its_time(start_server: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "twilight_apps.server.access")
    with start_server(token_s=0.02, limits={"drain_s": 0.2}) as running, running.client() as client:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            running.server.should_exit = True
            rest = [line for line in lines if line]
        error = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert error["type"] == "service_unavailable_error"
        assert "stopped" in error["message"]
    lines = [record.getMessage() for record in caplog.records if "/v1/completions 200" in record.getMessage()]
    assert len(lines) == 1 and "tokens, cut off (" in lines[0]  # its status was sent long before


def test_more_connections_than_allowed_are_503(start_server: Callable[..., Any]) -> None:
    with start_server(token_s=0.01, limits={"max_connections": 1}) as running:
        raw, data = _raw(running, stream=True)
        with raw:
            raw.sendall(data)
            raw.recv(100)
            response = running.chat()
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            with running.client() as client:  # operations stay reachable
                assert client.get("/health").status_code == 200
