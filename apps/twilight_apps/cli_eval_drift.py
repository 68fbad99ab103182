"""``hf-twilight eval ppl``, ``kl`` and ``pareto``: drift through the cache; and the options that evaluations share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .session import session

PRESETS = ["quality", "balanced", "compact"]

Text = Annotated[
    list[Path] | None, typer.Option("--text", help="A text file; repeatable; default: Python's language reference.")
]
Contexts = Annotated[
    list[int] | None,
    typer.Option("--context", help="Tokens of an excerpt; repeatable; default 2048 and 8000, with --small 2048."),
]
Presets = Annotated[
    list[str], typer.Option("--preset", help="A preset's name or a folder of save_pretrained; repeatable.")
]
Baselines = Annotated[
    list[str] | None,
    typer.Option("--baseline", help="As 'hqq 4-bit' (an unknown name lists all), or 'none'; repeatable; default: all."),
]
Modes = Annotated[list[str] | None, typer.Option("--mode", help="packing or decode; repeatable; default: both.")]
Excerpts = Annotated[int | None, typer.Option(help="Excerpts of each text; default 2, with --small 1.")]
Positions = Annotated[
    int | None, typer.Option(help="Tokens predicted one by one in the mode decode; default 256, with --small 64.")
]
Chunk = Annotated[int, typer.Option(help="Tokens of a forward in the mode packing; no more than windows hold.")]
Dtype = Annotated[str, typer.Option(help="Of the weights; float32 keeps the model's own rounding out of the figures.")]
Small = Annotated[bool, typer.Option("--small", help="Few tokens: minutes on two cores.")]
Out = Annotated[Path | None, typer.Option(help="Also write JSON, CSV and PNG into this folder.")]


def ppl(
    model: options.Model = "smollm2",
    dtype: Dtype = "float32",
    text: Text = None,
    contexts: Contexts = None,
    presets: Presets = PRESETS,
    baselines: Baselines = None,
    modes: Modes = None,
    excerpts: Excerpts = None,
    positions: Positions = None,
    chunk: Chunk = 64,
    small: Small = False,
    out: Out = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Perplexity through the cache: what each method makes of the text's next tokens.

    Packing feeds the text in chunks no longer than the window, so that packed pages are what is read. Decode
    reads a prompt and then goes on token by token, so that pruning acts. Dense is the stock cache.

    \b
    Examples:
      hf-twilight eval ppl --small
      hf-twilight eval ppl --text book.txt --context 8000 --preset balanced --baseline none --json
    """
    with session(verbose=verbose, quiet=quiet, seed=seed, threads=threads):
        _drift(
            "ppl", model, dtype, text, presets, baselines, small, out, json, contexts=contexts, excerpts=excerpts,
            positions=positions, chunk=chunk, modes=modes, seed=seed,
        )  # fmt: skip


def kl(
    model: options.Model = "smollm2",
    dtype: Dtype = "float32",
    text: Text = None,
    contexts: Contexts = None,
    presets: Presets = PRESETS,
    baselines: Baselines = None,
    modes: Modes = None,
    excerpts: Excerpts = None,
    positions: Positions = None,
    chunk: Chunk = 64,
    small: Small = False,
    out: Out = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Drift through the cache: how far each method's predictions are from the dense model's.

    The same runs as ppl. The divergence needs no text that the model finds likely and far fewer tokens than
    perplexity to tell methods apart.

    \b
    Examples:
      hf-twilight eval kl --small --out results
      hf-twilight eval kl --preset compact --preset ./calibrated --baseline "hqq 2-bit" --json
    """
    with session(verbose=verbose, quiet=quiet, seed=seed, threads=threads):
        _drift(
            "kl", model, dtype, text, presets, baselines, small, out, json, contexts=contexts, excerpts=excerpts,
            positions=positions, chunk=chunk, modes=modes, seed=seed,
        )  # fmt: skip


def pareto(
    model: options.Model = "smollm2",
    dtype: Dtype = "float32",
    text: Text = None,
    contexts: Contexts = None,
    presets: Presets = PRESETS,
    baselines: Baselines = None,
    excerpts: Excerpts = None,
    positions: Positions = None,
    chunk: Chunk = 64,
    small: Small = False,
    out: Out = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Which preset? Drift against bytes stored and against bytes read, all methods in one figure.

    The same runs as ppl and kl, both modes. With --out, pareto.png is the figure to choose by.

    \b
    Examples:
      hf-twilight eval pareto --small --out results
      hf-twilight eval pareto --text book.txt --preset balanced --preset ./calibrated --out results --json
    """
    with session(verbose=verbose, quiet=quiet, seed=seed, threads=threads):
        _drift(
            "pareto", model, dtype, text, presets, baselines, small, out, json, contexts=contexts, excerpts=excerpts,
            positions=positions, chunk=chunk, modes=None, seed=seed,
        )  # fmt: skip


def _drift(
    command: str,
    model: str,
    dtype: str,
    text: list[Path] | None,
    presets: list[str],
    baselines: list[str] | None,
    small: bool,
    out: Path | None,
    json: bool,
    **plan: Any,
) -> None:
    from . import eval_drift, eval_drift_tables, eval_output, eval_plots, eval_texts

    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in plan.items()
        if value is not None and value != []  # a repeatable option that was not given
    }
    defaults: dict[str, Any] = (
        {"contexts": (2048,), "excerpts": 1, "positions": 64}
        if small
        else {"contexts": (2048, 8000), "excerpts": 2, "positions": 256}
    )
    settings = eval_drift.Plan(**{**defaults, **given})
    texts = eval_texts.named_texts(text or [])
    eval_output.require_plotting(out)
    result = eval_drift.run(model, dtype, texts, settings, presets, baselines or [])
    eval_drift_tables.print_results(result, "ppl" if command == "ppl" else "kl")
    eval_output.finish(
        command, result, result["records"], out, json, lambda path: eval_plots.draw_drift(result, command, path)
    )
