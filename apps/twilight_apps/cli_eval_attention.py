"""``hf-twilight eval mass`` and ``budget``: what pruned attention keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .cli_eval_drift import Dtype, Out, Small
from .session import session

PRESETS = ["balanced"]

OneText = Annotated[Path | None, typer.Option("--text", help="A text file; default: Python's language reference.")]
Presets = Annotated[
    list[str], typer.Option("--preset", help="A preset's name or a folder of save_pretrained; repeatable.")
]
Steps = Annotated[int | None, typer.Option(help="Decode steps; default 32, with --small 8.")]


def mass(
    model: options.Model = "smollm2",
    dtype: Dtype = "float32",
    text: OneText = None,
    context: Annotated[int | None, typer.Option(help="Tokens of the excerpt; default 8000, with --small 2048.")] = None,
    presets: Presets = PRESETS,
    changes: options.Set = options.NO_CHANGES,
    shares: Annotated[
        list[float] | None,
        typer.Option("--p", help="Share asked for; repeatable; default 0.85, 0.9, 0.95 and 0.98, with --small 0.95."),
    ] = None,
    steps: Steps = None,
    small: Small = False,
    out: Out = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Attention mass: the share p that is asked for against the share that is attended to, by unrounded keys.

    Per layer, query head and step. Packed keys and a selector only estimate the mass; this is what they deliver.
    Queries and keys are the dense model's, so that layers are judged one by one.

    \b
    Examples:
      hf-twilight eval mass --small
      hf-twilight eval mass --preset compact --set selector=quest --p 0.9 --p 0.95 --out results
    """
    with session(verbose=verbose, quiet=quiet, seed=seed, threads=threads):
        from . import eval_heatmaps, eval_mass, eval_output, eval_texts, models

        plan = eval_mass.Plan(tuple(shares or ([0.95] if small else [0.85, 0.9, 0.95, 0.98])), _steps(steps, small))
        settings = eval_mass.chosen_settings(presets, changes)
        texts = eval_texts.named_texts([] if text is None else [text])
        eval_output.require_plotting(out)
        length = context if context is not None else 2048 if small else 8000
        excerpt = eval_texts.one_excerpt(models.load_tokenizer(model), texts, length, seed)
        result = {"seed": seed, **eval_mass.run(model, dtype, excerpt, settings, plan)}
        eval_mass.print_results(result)
        eval_output.finish(
            "mass", result, result["records"], out, json, lambda path: eval_heatmaps.draw_mass(result, path)
        )


def budget(
    model: options.Model = "smollm2",
    dtype: Dtype = "float32",
    text: OneText = None,
    contexts: Annotated[
        list[int] | None,
        typer.Option(
            "--context",
            help="Tokens in the cache; repeatable; default 1024, 2048, 4096 and 8000, with --small 1280 and 2048.",
        ),
    ] = None,
    presets: Presets = PRESETS,
    changes: options.Set = options.NO_CHANGES,
    steps: Steps = None,
    small: Small = False,
    out: Out = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Attention budget: the tokens each layer and head attends to, and how they grow with the context.

    \b
    Examples:
      hf-twilight eval budget --small
      hf-twilight eval budget --text book.txt --set p=0.9 --set min_sparse_len=0 --out results
    """
    with session(verbose=verbose, quiet=quiet, seed=seed, threads=threads):
        from . import eval_budget, eval_heatmaps, eval_methods, eval_output, eval_texts, models

        default = [1280, 2048] if small else [1024, 2048, 4096, 8000]
        plan = eval_budget.Plan(tuple(sorted(contexts or default)), _steps(steps, small))
        settings = eval_methods.configs(presets, changes)
        texts = eval_texts.named_texts([] if text is None else [text])
        eval_output.require_plotting(out)
        length = max(plan.contexts) + plan.steps
        excerpt = eval_texts.one_excerpt(models.load_tokenizer(model), texts, length, seed)
        result = {"seed": seed, **eval_budget.run(model, dtype, excerpt, settings, plan)}
        eval_budget.print_results(result)
        eval_output.finish(
            "budget", result, result["records"], out, json, lambda path: eval_heatmaps.draw_budget(result, path)
        )


def _steps(steps: int | None, small: bool) -> int:
    return steps if steps is not None else 8 if small else 32
