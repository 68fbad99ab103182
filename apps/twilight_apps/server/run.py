"""``hf-twilight serve``: load a model, listen, and stop without losing an answer."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from hf_twilight.engine import Engine, SamplingParams

from .. import models, tables
from .app import create_app
from .grammar import Vocabulary
from .limits import Limits
from .prompts import Prompts, template_text
from .service import Defaults, Service

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_twilight import TwilightConfig

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_BACKLOG = 512


@dataclass(frozen=True)
class Address:
    """Where the server listens, and who may ask.

    Args:
        host: name or address.
        port: 0 takes a free one.
        api_key: the key that clients must send; None for no key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None


@dataclass(frozen=True)
class EngineOptions:
    """What is passed on to ``Engine``."""

    max_running: int = 16
    max_waiting: int = 256
    max_cache_tokens: int | None = None
    prefill_tokens: int = 512
    seed: int = 0


@dataclass(frozen=True)
class ServedModel:
    """What is served.

    Args:
        model: name of the model to load.
        dtype: of its weights.
        settings: of its cache.
        settings_name: what people call them.
        name: what clients call it; None for the model's own name.
        chat_template: a file or a built-in template, instead of the tokenizer's.
    """

    model: str
    dtype: str
    settings: TwilightConfig
    settings_name: str
    name: str | None = None
    chat_template: str | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)


def run(served: ServedModel, address: Address, limits: Limits) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        OSError: the address cannot be listened on.
        ValueError: a model that the engine refuses, or an empty key.
    """
    template = None if served.chat_template is None else template_text(served.chat_template)
    listener = listen(address.host, address.port, stall_s=limits.stall_s)  # first: a taken port fails at once
    with listener:
        model, tokenizer = models.load(served.model, served.dtype), models.load_tokenizer(served.model)
        _warm_up(model, tokenizer, served.settings)
        with Engine(model, tokenizer, settings=served.settings, **vars(served.engine)) as engine:
            service = build_service(served.name or served.model, engine, model, tokenizer, limits, template)
            serve(
                service, listener, address.api_key,
                on_start=lambda: _introduce(service, model, served.settings_name, listener, address),
            )  # fmt: skip
    tables.say("stopped")


def _warm_up(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: TwilightConfig) -> None:
    """Pack and read a page on an engine of its own, so that no client waits for kernels to be compiled."""
    layout = settings.layout
    length = layout.num_sinks + layout.window + 2 * layout.page_size
    with Engine(model, tokenizer, settings=settings, max_running=1, max_cache_tokens=2 * length) as engine:
        prompt = [0] * min(length, engine.context - 2)
        engine.generate([prompt], SamplingParams(max_tokens=2, ignore_eos=True), progress=False)


def build_service(
    name: str,
    engine: Engine,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    chat_template: str | None = None,
) -> Service:
    """Put an engine behind the API; sampling defaults are the model's where it has some."""
    own = model.generation_config
    text_config = model.config.get_text_config(decoder=True)
    given = {name: getattr(own, name, None) for name in ("temperature", "top_p", "top_k")} if own.do_sample else {}
    ends = [own.eos_token_id] if isinstance(own.eos_token_id, int) else list(own.eos_token_id or ())
    end_tokens = {token for token in [*ends, tokenizer.eos_token_id] if token is not None}
    return Service(
        engine=engine,
        name=name,
        prompts=Prompts(tokenizer, chat_template),
        vocabulary=Vocabulary(tokenizer, text_config.vocab_size, sorted(end_tokens)),
        context=engine.context,
        vocabulary_size=text_config.vocab_size,
        limits=limits,
        defaults=Defaults(**{name: value for name, value in given.items() if value is not None}),
    )


def listen(host: str, port: int, *, stall_s: float) -> socket.socket:
    """Bind a socket.

    Args:
        host: name or address.
        port: 0 takes a free one.
        stall_s: seconds after which a connection whose peer takes no data is cut (Linux only).
    Raises:
        OSError: the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # there it would let a second server take the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_s * 1000))
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error
    return listener


def serve(service: Service, listener: socket.socket, api_key: str | None, on_start: Callable[[], None]) -> None:
    """Answer on a bound socket until a signal comes; drain, then return.

    Args:
        on_start: called once connections are taken.
    """
    server = Server(service, api_key, on_start)
    asyncio.run(server.serve(sockets=[listener]))


class Server(uvicorn.Server):
    """uvicorn, told to drain: running requests get ``drain_s`` seconds, then their clients get an error.

    A second signal cuts the wait short. The process ends with status 0, since stopping was asked for.
    """

    def __init__(
        self, service: Service, api_key: str | None = None, on_start: Callable[[], None] = lambda: None
    ) -> None:
        config = uvicorn.Config(
            create_app(service, api_key), log_config=None, access_log=False, lifespan="off", backlog=_BACKLOG,
            timeout_graceful_shutdown=int(service.limits.drain_s) + 5, server_header=False,
        )  # fmt: skip
        super().__init__(config)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._service = service
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop after the first signal, and at once after the second."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._service.is_draining = True
        if self.force_exit:
            self._service.stop_jobs()
        elif self._service.jobs:
            name, count = signal.Signals(sig).name, len(self._service.jobs)
            tables.say(
                f"{name}: {count} requests get {self._service.limits.drain_s:g} s to finish; once more stops at once"
            )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running requests, for a while."""
        self._service.is_draining = True
        end = asyncio.get_running_loop().call_later(self._service.limits.drain_s, self._service.stop_jobs)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()


def read_key(text: str | None, path: Path | None) -> str | None:
    """Return the API key, given or in a file; None for neither.

    Raises:
        ValueError: both, or an empty one.
        OSError: the file cannot be read.
    """
    if text is not None and path is not None:
        raise ValueError("--api-key and --api-key-file must not be given both; leave one out")
    key = path.read_text(encoding="utf-8").strip() if path is not None else text
    if key is not None and not key.strip():
        raise ValueError("the API key must not be empty; leave it out for a server without one")
    return key


def _introduce(
    service: Service, model: PreTrainedModel, preset: str, listener: socket.socket, address: Address
) -> None:
    host, port = listener.getsockname()[:2]
    base = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    dtype = str(model.dtype).removeprefix("torch.")
    key = ", with an API key" if address.api_key else ""
    tables.say(f"{service.name}: {dtype}, {service.context:,} tokens of context, {preset}")
    tables.say(f"  OpenAI API   {base}/v1{key}, model name {service.name!r}")
    tables.say(f"  operations   {base}/metrics, /health, /docs")
    if address.host not in _LOOPBACK and address.api_key is None:
        tables.say("  warning      everyone who reaches this address may use it; --api-key-file asks for a key")
    tables.say("Ctrl-C stops, once running requests are done.")
