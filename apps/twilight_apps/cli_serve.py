"""``hf-twilight serve`` and ``hf-twilight chat``: their command lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .chat import Chat
from .session import session

if TYPE_CHECKING:
    from .chat_partners import Manner

EXIT_FAILED = 1


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
    max_running: Annotated[int, typer.Option(help="Requests of a batch.", min=1)] = 16,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more get 429.", min=0)] = 256,
    max_cache_tokens: Annotated[int | None, typer.Option(help="Tokens that the pages hold in all.", min=1)] = None,
    prefill_tokens: Annotated[int, typer.Option(help="Prompt tokens that a step reads at most.", min=1)] = 512,
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
    with session(verbose=verbose, quiet=quiet, seed=seed, threads=threads):
        from .models import parse_settings
        from .server.access_log import access_logged
        from .server.limits import Limits
        from .server.run import Address, EngineOptions, ServedModel, read_key, run

        limits = Limits(
            max_body_kb * 1024, max_prompt_tokens, max_new_tokens, max_connections=max_connections, stall_s=stall_s,
            drain_s=drain_s,
        )  # fmt: skip
        engine = EngineOptions(max_running, max_waiting, max_cache_tokens, prefill_tokens, seed)
        described = " ".join([f"preset {preset}", *changes])
        served = ServedModel(model, dtype, parse_settings(preset, changes), described, name, chat_template, engine)
        address = Address(host, port, read_key(api_key, api_key_file))
        with access_logged(verbose, quiet):
            run(served, address, limits)


def chat(
    url: Annotated[str | None, typer.Option(help="A server's address; default: load a model here.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Default: smollm2; with --url the server's first.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="For --url.", envvar=["HF_TWILIGHT_API_KEY", "OPENAI_API_KEY"])
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model shall be.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer; default: what the context leaves.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token; default: the server's, or 0 here.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights, as for serve; not with --url.")] = None,
    preset: Annotated[str | None, typer.Option(help="As for serve; not with --url.")] = None,
    changes: options.Set = options.NO_CHANGES,
    seed: Annotated[int | None, typer.Option(help="Of the answers' random numbers.")] = None,
    threads: options.Threads = None,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Talk to a model: one that a server has (any with OpenAI's API), or one loaded here.

    Reads questions line by line, so a file can be piped in. Exit status 1 if an answer failed.

    \b
    Examples:
      hf-twilight chat
      hf-twilight chat --url http://127.0.0.1:8000
      echo "What is a whale?" | hf-twilight chat --max-tokens 60
    """
    with session(verbose=verbose, quiet=quiet, threads=threads):
        from .chat_partners import Manner, ServerPartner

        manner = Manner(max_tokens, temperature, seed)
        if url is not None:
            if dtype is not None or preset is not None or changes:
                raise ValueError("--url must stand without --dtype, --preset and --set: the server has its own")
            failures = Chat(ServerPartner(url, model, api_key, manner), system).run()
        else:
            failures = _chat_here(model or "smollm2", dtype or "auto", preset or "balanced", changes, system, manner)
    if failures:
        raise typer.Exit(EXIT_FAILED)


def _chat_here(name: str, dtype: str, preset: str, changes: list[str], system: str | None, manner: Manner) -> int:
    """Load a model and talk to it; return how many answers failed."""
    from hf_twilight.engine import Engine

    from .chat_partners import ModelPartner
    from .models import load, load_tokenizer, parse_settings

    settings = parse_settings(preset, changes)
    model, tokenizer = load(name, dtype), load_tokenizer(name)
    with Engine(model, tokenizer, settings=settings, max_running=1) as engine:
        return Chat(ModelPartner(engine, name, manner), system).run()
