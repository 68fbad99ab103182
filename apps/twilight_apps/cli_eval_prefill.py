"""``hf-twilight eval prefill``: what sparse prefill changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .cli_eval_drift import Dtype, Out, Small
from .session import session

PRESETS = ["balanced"]


def prefill(
    model: options.Model = "smollm2",
    dtype: Dtype = "float32",
    texts: Annotated[
        list[Path] | None, typer.Option("--text", help="Text files; repeatable; default: Python's language reference.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of an excerpt; default 8000, with --small 4096.")] = None,
    excerpts: Annotated[int | None, typer.Option(help="Excerpts of each text; default 3, with --small 1.")] = None,
    alphas: Annotated[
        list[float] | None, typer.Option("--alpha", help="Share of the mass asked for; repeatable; default 0.95.")
    ] = None,
    changes: options.Set = options.NO_CHANGES,
    small: Small = False,
    out: Out = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Sparse prefill: the next token after it against dense prefill, and the mass and pairs it computes.

    The cache keeps raw keys and values, so that nothing but prefill differs. Compared are the distributions of the next
    token after the prompt, and after each of its last 256 positions.

    \b
    Examples:
      hf-twilight eval prefill --small
      hf-twilight eval prefill --text book.txt --alpha 0.9 --alpha 0.95 --alpha 0.98 --out results
    """
    with session(verbose=verbose, quiet=quiet, seed=seed, threads=threads):
        from . import eval_output, eval_prefill, eval_texts

        length = context if context is not None else 4096 if small else 8000
        count = excerpts if excerpts is not None else 1 if small else 3
        named = eval_texts.named_texts(texts or [])
        eval_output.require_plotting(out)
        result = eval_prefill.run(
            model, dtype, named, length, count, alphas=tuple(alphas or [0.95]), changes=changes, seed=seed
        )
        eval_prefill.print_results(result)
        eval_output.finish(
            "prefill", result, result["records"], out, json, lambda path: eval_prefill.draw(result, path)
        )
