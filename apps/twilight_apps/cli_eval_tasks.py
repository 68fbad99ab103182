"""``hf-twilight eval needle`` and ``ruler``: questions about long documents."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .cli_eval_drift import PRESETS, Dtype, Out, Presets, Small, Text
from .session import session

Baselines = Annotated[
    list[str] | None,
    typer.Option("--baseline", help="A baseline beside the dense model, as 'hqq 4-bit'; repeatable; default: none."),
]


def needle(
    model: options.Model = "smollm2",
    dtype: Dtype = "float32",
    text: Text = None,
    lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--context", help="Tokens of the document; repeatable; default 1000 to 4000, with --small 1000 and 2000."
        ),
    ] = None,
    depths: Annotated[
        list[float] | None,
        typer.Option(
            "--depth", help="Where the needle is, 0 to 1; repeatable; default every eighth, with --small 0.1, 0.5, 0.9."
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Needles for each length and depth; default 2, --small 1.")] = None,
    presets: Presets = PRESETS,
    changes: options.Set = options.NO_CHANGES,
    baselines: Baselines = None,
    small: Small = False,
    out: Out = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Needle in a haystack: a pass key hidden in prose, asked for through the chat template.

    Every method gets the same documents; the dense model's finds are the measure, cell by cell.

    \b
    Examples:
      hf-twilight eval needle --small --out results
      hf-twilight eval needle --text book.txt --context 4000 --preset compact --baseline "hqq 4-bit"
      hf-twilight eval needle --context 6000 --preset exact --set alpha=0.95 --set "dense_layers=[0, 1]"
    """
    with session(verbose=verbose, quiet=quiet, seed=seed, threads=threads):
        from . import eval_answer_plots, eval_answers, eval_needle, eval_output, eval_texts

        plan = eval_needle.Plan(
            tuple(lengths or ([1000, 2000] if small else [1000, 2000, 3000, 4000])),
            tuple(depths or ([0.1, 0.5, 0.9] if small else [eighth / 8 for eighth in range(9)])),
            trials if trials is not None else 1 if small else 2,
            seed,
        )
        eval_output.require_plotting(out)
        named = eval_texts.named_texts(text or [])
        result = eval_answers.run(model, dtype, named, plan, presets, baselines or [], changes)
        eval_needle.print_results(result)
        eval_output.finish(
            "needle", result, result["records"], out, json, lambda path: eval_answer_plots.draw_needle(result, path)
        )


def ruler(
    model: options.Model = "smollm2",
    dtype: Dtype = "float32",
    text: Text = None,
    lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--context", help="Tokens of the document; repeatable; default 1000, 2000 and 4000, with --small 1500."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="As 'multi-key'; repeatable; default: all seven.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Questions for each task and length; default 10, with --small 2.")
    ] = None,
    presets: Presets = PRESETS,
    changes: options.Set = options.NO_CHANGES,
    baselines: Baselines = None,
    small: Small = False,
    out: Out = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """RULER-style tasks, made here: needles of four kinds, variable tracking, common and frequent words.

    An answer scores the share of the expected strings that it holds. A small model fails many tasks by itself:
    compare with the dense model's row.

    \b
    Examples:
      hf-twilight eval ruler --small
      hf-twilight eval ruler --task "multi-key" --context 4000 --samples 20 --out results --json
    """
    with session(verbose=verbose, quiet=quiet, seed=seed, threads=threads):
        from . import eval_answer_plots, eval_answers, eval_output, eval_ruler, eval_texts
        from .ruler_tasks import TASKS

        plan = eval_ruler.Plan(
            tuple(lengths or ([1500] if small else [1000, 2000, 4000])),
            tuple(tasks or TASKS),
            samples if samples is not None else 2 if small else 10,
            seed,
        )
        eval_output.require_plotting(out)
        named = eval_texts.named_texts(text or [])
        result = eval_answers.run(model, dtype, named, plan, presets, baselines or [], changes)
        eval_ruler.print_results(result)
        eval_output.finish(
            "ruler", result, result["records"], out, json, lambda path: eval_answer_plots.draw_ruler(result, path)
        )
