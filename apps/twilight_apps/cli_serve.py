"""``hf-twilight serve`` and ``hf-twilight chat``: their command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .session import session


def serve(
    model: options.Model = "smollm2",
    dtype: options.Dtype = "auto",
    preset: options.Preset = "balanced",
    changes: options.Set = options.NO_CHANGES,
    host: Annotated[str, typer.Option(help="0.0.0.0 for every interface; then ask for a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="The key that clients must send.", envvar="HF_TWILIGHT_API_KEY")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with that key.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: --model.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A Jinja file, or chatml-tools: teaches tools to models trained on ChatML.")
    ] = None,
    max_running: Annotated[int, typer.Option(help="Requests of a batch.")] = 16,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more get 429.")] = 256,
    max_cache_tokens: Annotated[int | None, typer.Option(help="Tokens that the pages hold in all.")] = None,
    prefill_tokens: Annotated[int, typer.Option(help="Prompt tokens that a step reads at most.")] = 512,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Longest prompt; default: the context.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer; default: the context.")] = None,
    max_body_kb: Annotated[int, typer.Option(help="Largest request body, in kB of 1,024 bytes.", min=1)] = 1024,
    max_connections: Annotated[int, typer.Option(help="Open requests; more get 503.")] = 512,
    stall_s: Annotated[float, typer.Option(help="Seconds a stream may be left unread.")] = 30.0,
    drain_s: Annotated[float, typer.Option(help="Seconds that running requests get at the end.")] = 30.0,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Serve a model to OpenAI clients: chat and text completions, streams, JSON schemas, tools.

    Requests are batched, and share the pages of what their prompts have in common. Listens on this machine only,
    unless --host says otherwise. Logs one line a request; --quiet does not. docs/serving.md has more.

    \b
    Examples:
      hf-twilight serve
      hf-twilight serve --model ./my-model --preset compact --port 8080 --api-key-file key.txt
      hf-twilight serve --chat-template chatml-tools
    """
    with session(verbose=verbose + 1, quiet=quiet, seed=seed, threads=threads):
        from .models import parse_settings
        from .server.limits import Limits
        from .server.run import Address, EngineOptions, ServedModel, read_key, run

        limits = Limits(
            max_body_kb * 1024, max_prompt_tokens, max_new_tokens, max_connections=max_connections, stall_s=stall_s,
            drain_s=drain_s,
        )  # fmt: skip
        engine = EngineOptions(max_running, max_waiting, max_cache_tokens, prefill_tokens, seed)
        served = ServedModel(model, dtype, parse_settings(preset, changes), name, chat_template, engine)
        run(served, Address(host, port, read_key(api_key, api_key_file)), limits)
