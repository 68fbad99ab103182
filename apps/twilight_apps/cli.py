"""``hf-twilight``: the command line. Heavy imports stay inside commands, so that ``--help`` is fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .cli_bench import bench
from .cli_eval import evaluation
from .cli_serve import chat, serve
from .environment import print_json
from .session import session

EXIT_MISMATCH = 1

app = typer.Typer(
    name="hf-twilight",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Long-context inference with a packed KV cache and sparse attention, beside the stock cache.\n\n"
    "Start with [bold]hf-twilight generate[/bold]: it needs no arguments and no network.",
)
app.add_typer(bench, name="bench")
app.add_typer(evaluation, name="eval")


def main() -> None:
    """Run the command line."""
    app()


@app.command()
def generate(
    model: options.Model = "smollm2",
    dtype: options.Dtype = "auto",
    preset: Annotated[
        str | None, typer.Option(help="exact, quality, balanced (default), compact; or a folder.")
    ] = None,
    changes: options.Set = options.NO_CHANGES,
    document: Annotated[
        Path | None,
        typer.Option(help="A text file; default: Python's language reference, a fact hidden in it."),
    ] = None,
    question: Annotated[str | None, typer.Option(help="Default: asks for the hidden fact.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A plain prompt, instead of a document.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of the document that are read.")] = 3500,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.")] = 0.0,
    compare: Annotated[bool, typer.Option(help="Ask the stock cache too.")] = True,
    save_cache: Annotated[Path | None, typer.Option(help="Write the prefilled document here.")] = None,
    load_cache: Annotated[Path | None, typer.Option(help="Ask what --save-cache wrote again.")] = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Answer a question about a long document, from packed pages and from the stock cache.

    Without arguments: 3,500 tokens of real text with a fact hidden halfway, a question about it, both answers
    as they are written, and a table of bytes, times and attention.

    \b
    Examples:
      hf-twilight generate
      hf-twilight generate --preset compact --document report.txt --question "What was decided?"
      hf-twilight generate --save-cache report.safetensors --document report.txt
      hf-twilight generate --load-cache report.safetensors --question "Who was against it?"
    """
    with session(verbose=verbose, quiet=quiet, seed=seed, threads=threads):
        from .generate import Request, run
        from .models import parse_settings

        if load_cache is not None and (preset is not None or changes):
            raise ValueError("--load-cache must stand without --preset and --set: the file has its own")
        request = Request(document, question, prompt, context, max_new_tokens, temperature, save_cache, load_cache)
        settings = parse_settings(preset or "balanced", changes)
        result = run(request, model, dtype, settings, compare=compare)
        if json:
            print_json("generate", preset=None if load_cache else preset or "balanced", seed=seed, **result)


@app.command()
def parity(
    model: options.Model = "smollm2",
    dtype: options.Dtype = "float32",
    preset: options.Preset = "exact",
    changes: options.Set = options.NO_CHANGES,
    new_tokens: Annotated[int, typer.Option(help="Tokens that each mode generates.")] = 64,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Compare your model with and without Twilight, in every way of generating.

    Greedy, long greedy, sampling, a left-padded batch, beams, chunked prefill, prompt lookup, three turns
    with one cache, and a prefilled cache copied and continued twice: each once with the stock cache, once
    with Twilight. "Drift" feeds the stock cache's tokens to both and compares logits.

    Exit status: 0 if what must be identical is. With the preset exact that is every token; other presets may
    differ, and then only a mode that fails counts. 1 otherwise, 2 for wrong arguments.

    \b
    Examples:
      hf-twilight parity --model ./my-model
      hf-twilight parity --preset balanced --json
    """
    with session(verbose=verbose, quiet=quiet, seed=seed, threads=threads):
        from .models import parse_settings
        from .parity import run

        result = run(model, dtype, parse_settings(preset, changes), new_tokens=new_tokens, seed=seed)
        if json:
            print_json("parity", preset=preset, seed=seed, **result)
    if not result["is_passed"]:
        raise typer.Exit(EXIT_MISMATCH)


@app.command()
def calibrate(
    text: Annotated[list[Path], typer.Option(help="A UTF-8 text file; the kind the model will read. Repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder of the result; an interrupted run goes on from it.")],
    model: options.Model = "smollm2",
    dtype: options.Dtype = "float32",
    preset: Annotated[str, typer.Option(help="Where other settings come from: quality, balanced or compact.")] = (
        "balanced"
    ),
    changes: options.Set = options.NO_CHANGES,
    codec: Annotated[
        str, typer.Option(help="channel: bits of each layer. skvq: the paper's reorder and clips, to compare with.")
    ] = "channel",
    ratio: Annotated[
        float | None, typer.Option(help="Times smaller than bf16 at 8,000 tokens; default: 3.2, 4.0 or 5.5.")
    ] = None,
    max_drift: Annotated[
        float | None, typer.Option(help="Nats a token that top-p may add: choose p by it. Default: keep p.")
    ] = None,
    sample_len: Annotated[int, typer.Option(help="Tokens of a sample; longer ones weigh long contexts.")] = 4096,
    samples: Annotated[int, typer.Option(help="Samples; time grows with them.")] = 1,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="Choose alpha too: the smallest that keeps 99 % of the dense score.")
    ] = False,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Choose how each layer is packed for your model, from a text: some minutes for a small model on a CPU.

    Keys, then values, of one layer at a time are rounded, and how far the output moves is measured; then bytes
    are spent where they matter. Ctrl-C loses nothing: the same command goes on, and another --ratio takes seconds.

    \b
    Examples:
      hf-twilight calibrate --text notes.txt --out ./compact --preset compact
      hf-twilight calibrate --text book.txt --out ./mine --prefill
      hf-twilight generate --preset ./compact
    """
    with session(verbose=verbose, quiet=quiet, seed=seed, threads=threads):
        from .calibrate import run, run_skvq

        if codec == "skvq":
            if (preset, changes, ratio, max_drift, samples, prefill) != ("balanced", [], None, None, 1, False):
                raise ValueError("only --sample-len and --seed may be given with --codec skvq, got another setting")
            result = run_skvq(model, dtype, text, out, sample_len=sample_len, seed=seed)
        elif codec == "channel":
            result = run(
                model, dtype, text, out, preset=preset, changes=changes, ratio=ratio, max_drift=max_drift,
                sample_len=sample_len, samples=samples, seed=seed, with_prefill=prefill,
            )  # fmt: skip
        else:
            raise ValueError(f"codec must be channel or skvq, got {codec!r}")
        if json:
            print_json("calibrate", seed=seed, **result)


@app.command()
def env(json: options.Json = False, verbose: options.Verbose = 0, quiet: options.Quiet = False) -> None:
    """Show versions, processor, threads, devices and what of hf-twilight is in place; for bug reports.

    \b
    Example:
      hf-twilight env --json
    """
    with session(verbose=verbose, quiet=quiet):
        from .environment import environment, installation
        from .tables import print_table

        facts = {**environment(), **installation()}
        facts.pop("presets")
        rows = [[name, _flat(value)] for name, value in facts.items()]
        print_table("hf-twilight", ["fact", "here"], rows, left=2)
        if json:
            print_json("env", **installation())


@app.command("stage-kernels")
def stage_kernels(
    out: Annotated[Path, typer.Option(help="Folder: new, empty, or staged before.")],
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Lay the kernels out as the package kernels loads them from a folder or the Hub.

    \b
    Example:
      hf-twilight stage-kernels --out ./twilight-kernels
    """
    with session(verbose=verbose, quiet=quiet):
        from .stage_kernels import stage
        from .tables import say

        result = stage(out)
        say(f"{result['files']} files for each of {', '.join(result['backends'])} in {out}")
        if json:
            print_json("stage-kernels", **result)


app.command()(serve)
app.command()(chat)


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_flat, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


if __name__ == "__main__":
    main()
