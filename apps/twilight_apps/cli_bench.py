"""``hf-twilight bench``: the benchmarks' command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .cli_bench_gpu import aot, gpu
from .environment import print_json
from .session import session

DECODE_CONTEXTS = [8192, 32768]
GENERATE_CONTEXTS = [8000]
DTYPES = ["bfloat16"]
PRESETS = ["balanced", "compact"]
PREFILL_LAYERS = [2, 7, 12, 17, 22, 27]
WORKLOADS = ["w1"]
NO_ENTRANTS: list[str] = []

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Time Twilight against baselines that run in the same minutes, round by round.",
)
bench.command("aot")(aot)
bench.command("gpu")(gpu)


@bench.command("decode")
def decode(
    shape: Annotated[
        str, typer.Option(help="llama3-8b, smollm2, or query heads, KV heads, head dim as H,K,D.")
    ] = "llama3-8b",
    contexts: Annotated[
        list[int], typer.Option("--context", help="Tokens in the cache; repeatable.")
    ] = DECODE_CONTEXTS,
    p: Annotated[float, typer.Option("--p", help="Share of the attention mass that sparse decode keeps.")] = 0.95,
    preset: options.Preset = "compact",
    rounds: Annotated[int, typer.Option(help="Timed rounds; every entrant runs once a round.")] = 30,
    measure_concentration: Annotated[
        bool,
        typer.Option(help="Measure how concentrated the embedded model's attention is, instead of timing."),
    ] = False,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Time one layer's decode attention: packed pages against dense attention on plain keys.

    Inputs are synthetic with attention as concentrated as the embedded model's: each query head's logits fall
    with the logarithm of the rank, over positions in random order (so pages hold no cluster that helps a
    selector).
    Entrants: Transformers' sdpa in float32 and bfloat16, the fastest dense float32 formulation found, and
    ours with p, with p and the quest selector, and dense, for 2-bit pages and for the preset.

    Nothing is timed unless its output agrees with the float64 definition on the same pages.

    \b
    Examples:
      hf-twilight bench decode --context 32768 --json
      hf-twilight bench decode --shape 32,8,128 --context 131072 --preset balanced
      hf-twilight bench decode --measure-concentration
    """
    with session(verbose=verbose, quiet=quiet, seed=seed, threads=threads):
        if measure_concentration:
            from .concentration import measure

            result = measure(p=p)
        else:
            from .bench_decode import run

            result = run(shape, contexts, p=p, preset=preset, rounds=rounds, seed=seed)
        if json:
            print_json("bench decode", seed=seed, **result)


@bench.command("generate")
def generate(
    model: options.Model = "smollm2",
    contexts: Annotated[
        list[int], typer.Option("--context", help="Tokens in the cache; repeatable.")
    ] = GENERATE_CONTEXTS,
    new_tokens: Annotated[int, typer.Option(help="Timed tokens.")] = 64,
    dtypes: Annotated[list[str], typer.Option("--dtype", help="Of the weights; repeatable.")] = DTYPES,
    presets: Annotated[list[str], typer.Option("--preset", help="Repeatable.")] = PRESETS,
    changes: options.Set = options.NO_CHANGES,
    text: Annotated[Path | None, typer.Option(help="A text file; default: Python's language reference.")] = None,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Time the whole model, token by token: the stock cache against presets, in turns.

    The stock cache reads the prompt once; the other caches are filled with its exact keys and values. Then
    they take turns of a few tokens, the first of each not timed. All are fed what the stock cache wrote
    before, so that the contexts stay the same.

    \b
    Examples:
      hf-twilight bench generate --context 8000 --dtype bfloat16 --dtype float32 --json
      hf-twilight bench generate --context 2000 --preset compact --set p=0.9
    """
    with session(verbose=verbose, quiet=quiet, threads=threads):
        from .bench_generate import run
        from .models import parse_settings

        settings = {name: parse_settings(name, changes) for name in presets}
        result = run(model, contexts, dtypes, settings, new_tokens=new_tokens, text=text)
        if json:
            print_json("bench generate", **result)


@bench.command("prefill")
def prefill(
    model: options.Model = "smollm2",
    contexts: Annotated[
        list[int], typer.Option("--context", help="Tokens of the prompt; repeatable.")
    ] = GENERATE_CONTEXTS,
    dtypes: Annotated[list[str], typer.Option("--dtype", help="Of the weights; repeatable.")] = DTYPES,
    preset: options.Preset = "balanced",
    changes: options.Set = options.NO_CHANGES,
    layers: Annotated[list[int], typer.Option("--layer", help="Layers to time alone; repeatable.")] = PREFILL_LAYERS,
    rounds: Annotated[int, typer.Option(help="Whole forwards of each cache; 0 times layers only.")] = 2,
    whole_only: Annotated[bool, typer.Option("--whole-only", help="Time no layers, whole forwards only.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for bench-prefill.json, .csv and .png; made if missing.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file; default: Python's language reference.")] = None,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Time reading a prompt: sparse prefill against dense, layer by layer and to the first token.

    Layers are timed on the model's own queries, keys and values, and only if the last rows agree with the float64
    definition. Then whole forwards with the stock cache and with ours take turns.

    \b
    Examples:
      hf-twilight bench prefill --context 8000 --dtype bfloat16 --dtype float32 --json
      hf-twilight bench prefill --context 32000 --rounds 0 --layer 12 --set alpha=0.9
      hf-twilight bench prefill --context 1000 --context 4000 --context 16000 --whole-only --out results
    """
    with session(verbose=verbose, quiet=quiet, threads=threads):
        from .bench_prefill import Plan, draw, run
        from .eval_output import require_plotting, write
        from .models import parse_settings
        from .tables import say

        if (whole_only and not rounds) or (out is not None and not rounds):
            raise ValueError("rounds must be at least 1 with --whole-only or --out, got 0")
        require_plotting(out)
        plan = Plan(tuple(contexts), tuple(dtypes), () if whole_only else tuple(layers), rounds)
        result = run(model, parse_settings(preset, changes), plan, text=text)
        if out is not None:
            rows = [{k: v for k, v in found.items() if k != "layers"} for found in result["results"]]
            paths = write(out, "bench-prefill", result, rows, lambda path: draw(result, path))
            say(f"written: {', '.join(map(str, paths))}")
        if json:
            print_json("bench prefill", **result)


@bench.command("serve")
def serve(
    model: options.Model = "smollm2",
    dtype: options.Dtype = "float32",
    preset: options.Preset = "balanced",
    changes: options.Set = options.NO_CHANGES,
    workloads: Annotated[
        list[str], typer.Option("--workload", help="w1 burst, w2 spread in time, w3 chats, w10 long; repeatable.")
    ] = WORKLOADS,
    entrants: Annotated[
        list[str],
        typer.Option("--entrant", help="twilight, twilight-unshared, cb, cb-tuned or generate; repeatable."),
    ] = NO_ENTRANTS,
    requests: Annotated[int, typer.Option(help="Of w1 and w10; w2 has twice as many.")] = 16,
    shared: Annotated[int, typer.Option(help="Tokens of the system prompt of w1 and w2.")] = 512,
    answer: Annotated[int, typer.Option(help="Tokens of each answer, but of w3.")] = 32,
    rate: Annotated[float, typer.Option(help="Requests a second of w2.")] = 1.0,
    context: Annotated[int, typer.Option(help="Tokens of w10's prompts.")] = 1000,
    rounds: Annotated[int, typer.Option(help="Runs of each entrant.")] = 1,
    limit_s: Annotated[float, typer.Option(help="Seconds after which a run is stopped.")] = 180.0,
    total_s: Annotated[float, typer.Option(help="Seconds that everything may take.")] = 900.0,
    memory_share: Annotated[
        float, typer.Option(help="Of the machine's memory, for the cache of cb; Transformers' own default is 0.6.")
    ] = 0.25,
    text: Annotated[Path | None, typer.Option(help="A text file; default: Python's language reference.")] = None,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Serve many requests: our engine, Transformers' continuous batching (default and tuned), generate in turn.

    All in this process, in turns, with the same weights. Counted first: rows of prompts that were computed and
    forwards of the model. Then timed: the whole, to the first token, and decoding.

    \b
    Examples:
      hf-twilight bench serve --workload w1 --json
      hf-twilight bench serve --workload w10 --requests 4 --context 500 --entrant twilight --entrant cb-tuned
    """
    with session(verbose=verbose, quiet=quiet, threads=threads):
        from .bench_serve import Effort, run
        from .models import parse_settings
        from .workloads import Sizes

        sizes = Sizes(requests=requests, shared=shared, answer=answer, rate=rate, context=context)
        result = run(
            model, dtype, parse_settings(preset, changes), workloads, entrants, sizes, Effort(rounds, limit_s, total_s),
            memory_share=memory_share, text=text,
        )  # fmt: skip
        if json:
            print_json("bench serve", preset=preset, **result)
