"""A server on a real socket, in front of an engine whose model is a hash: same contract, no weights."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import httpx2
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_twilight.engine import Completion, EngineClosed, EngineStats, QueueFull, SamplingParams, Token
from twilight_apps.server.grammar import Vocabulary
from twilight_apps.server.limits import Limits
from twilight_apps.server.prompts import Prompts, template_text
from twilight_apps.server.run import Server, listen
from twilight_apps.server.service import Service

CONTEXT = 2048
PREFERRED = range(32, 127)  # letters rather than control characters


class FakeHandle:
    """A request of ``FakeEngine``, computed on a thread of its own."""

    def __init__(self, engine: FakeEngine, prompt: list[int], params: SamplingParams, request_id: str) -> None:
        self.request_id = request_id
        self.prompt, self.params = prompt, params
        self.is_cancelled = False
        self.tokens: list[Token] = []
        self.completion: Completion | None = None
        self.error: Exception | None = None
        self._engine = engine
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def cancel(self) -> None:
        self.is_cancelled = True

    def __iter__(self) -> Iterator[Token]:
        for index in itertools.count():
            while index >= len(self.tokens) and self.completion is None:
                time.sleep(0.001)
            if index >= len(self.tokens):
                self._raise()
                return
            yield self.tokens[index]

    async def __aiter__(self) -> AsyncIterator[Token]:
        for index in itertools.count():
            while index >= len(self.tokens) and self.completion is None:
                await asyncio.sleep(0.001)
            if index >= len(self.tokens):
                self._raise()
                return
            yield self.tokens[index]

    def __await__(self) -> Generator[Any, None, Completion]:
        while self.completion is None:
            yield from asyncio.sleep(0.001).__await__()
        self._raise()
        return self.completion

    def result(self, timeout: float | None = None) -> Completion:
        self._thread.join(timeout)
        if self.completion is None:
            raise TimeoutError
        self._raise()
        return self.completion

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        ids: list[int] = []
        try:
            reason = self._generate(ids)
        except Exception as error:
            reason, self.error = "error", error
        text = "".join(token.text for token in self.tokens)
        cached = self._engine.cached_tokens(self.prompt)
        self.completion = Completion(text, ids, reason, len(self.prompt), cached)
        self._engine.live.discard(self)

    def _generate(self, ids: list[int]) -> str:
        params, text = self.params, ""
        while True:
            if self.is_cancelled or self._engine.is_closed:
                return "cancelled"
            time.sleep(self._engine.token_s)
            token, logprobs = self._engine.next_token(self.prompt, ids, params)
            ids.append(token)
            is_end = token == self._engine.end_token and not params.ignore_eos
            new = "" if is_end else self._engine.tokenizer.decode([token], skip_special_tokens=True)
            reason = "stop" if is_end else "length" if len(ids) == params.max_tokens else None
            for stop in params.stop:
                if stop in text + new:
                    new, reason = (text + new).split(stop)[0][len(text) :], "stop"
            text += new
            top = logprobs.topk(params.logprobs or 0)
            self.tokens.append(
                Token(
                    token_id=token,
                    text=new,
                    logprob=None if params.logprobs is None else float(logprobs[token]),
                    top_logprobs=tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
                    finish_reason=reason,
                )
            )
            if reason is not None:
                return reason


class FakeEngine:
    """The engine's contract without a model: logits are a hash of the last tokens.

    Args:
        tokenizer: one token a byte.
        token_s: seconds that a token takes.
        capacity: requests that may be in flight; more raise ``QueueFull``.
        script: what every answer says, instead of the hash's letters.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, token_s: float = 0.0, capacity: int = 64, script: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.token_s, self.capacity = token_s, capacity
        self.script = None if script is None else [*tokenizer(script)["input_ids"], tokenizer.eos_token_id]
        self.end_token = tokenizer.eos_token_id
        self.is_closed, self.error, self.is_alive = False, None, True
        self.live: set[FakeHandle] = set()
        self.seen: list[FakeHandle] = []
        self.fault: Exception | None = None

    def submit(
        self, prompt: list[int], params: SamplingParams, *, priority: int = 0, request_id: str | None = None
    ) -> FakeHandle:
        if self.is_closed:
            raise EngineClosed("closed")
        if len(self.live) >= self.capacity:
            raise QueueFull(f"{self.capacity} requests are in flight", retry_after_s=2.5)
        handle = FakeHandle(self, prompt, params, request_id or "")
        self.live.add(handle)  # before its thread can end
        self.seen.append(handle)
        handle.start()
        return handle

    def next_token(self, prompt: Sequence[int], ids: list[int], params: SamplingParams) -> tuple[int, torch.Tensor]:
        if self.fault is not None:
            raise self.fault
        size = len(self.tokenizer)
        if self.script is not None:
            logits = torch.zeros(size)
            logits[self.script[min(len(ids), len(self.script) - 1)]] = 9.0
        else:
            key = zlib.crc32(bytes(str([*prompt, *ids][-8:]) + str(params.seed), "ascii"))
            logits = torch.randn(size, generator=torch.Generator().manual_seed(key))
            letters = self.tokenizer.convert_tokens_to_ids([chr(letter) for letter in PREFERRED if letter != 32])
            logits[letters] += 3.0
            logits[self.end_token] += 1.5
        if params.logits_processor is not None:
            logits = params.logits_processor(ids, logits)
        logprobs = logits.log_softmax(-1)
        return int(logprobs.argmax()), logprobs

    def cached_tokens(self, prompt: list[int]) -> int:
        earlier = [handle.prompt for handle in self.seen if handle.prompt is not prompt]
        return max((sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(prompt, other, strict=False)))
                    for other in earlier), default=0)  # fmt: skip

    def stats(self) -> EngineStats:
        counts = {field.name: 0 for field in fields(EngineStats)}
        return EngineStats(**{**counts, "running": len(self.live), "kept_mass": 1.0})  # type: ignore[arg-type]

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Running:
    """A server and how to reach it."""

    engine: FakeEngine
    service: Service
    server: Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=20, trust_env=False)

    def post(self, path: str, **kwargs: Any) -> httpx2.Response:
        with self.client() as client:
            return client.post(path, **kwargs)

    def chat(self, text: str = "hello", **fields: Any) -> httpx2.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}
        return self.post("/v1/chat/completions", json=body)

    def wait_idle(self, seconds: float = 5.0) -> None:
        """Wait until the engine has nothing left, and the server no job."""
        end = time.monotonic() + seconds
        while self.engine.live or self.service.jobs:
            assert time.monotonic() < end, f"{len(self.engine.live)} requests still run"
            time.sleep(0.005)


@pytest.fixture(scope="session")
def tokenizer(tiny_model: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    return Vocabulary(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


@pytest.fixture(scope="session")
def start_server(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> Callable[..., Any]:
    """Start a server: ``with start_server(limits={...}, api_key=..., token_s=..., script=...) as running``."""

    @contextmanager
    def start(limits: dict[str, Any] | None = None, api_key: str | None = None, **engine: Any) -> Iterator[Running]:
        fake = FakeEngine(tokenizer, **engine)
        service = Service(
            fake, "tiny", Prompts(tokenizer, template_text("chatml-tools")), vocabulary, CONTEXT, len(tokenizer),
            replace(Limits(drain_s=1.0), **(limits or {})),
        )  # type: ignore[arg-type]  # fmt: skip
        listener = listen("127.0.0.1", 0, stall_s=service.limits.stall_s)
        server = Server(service, api_key)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield Running(fake, service, server, listener.getsockname()[1])
        finally:
            server.should_exit = server.force_exit = True
            fake.close()
            thread.join(5)
            listener.close()

    return start


@pytest.fixture(scope="module")
def running(start_server: Callable[..., Any]) -> Iterator[Running]:
    """A server with default limits and a fast engine, shared by a module's tests."""
    with start_server() as found:
        yield found
