"""``hf-twilight eval``: the evaluations, put together."""

from __future__ import annotations

import typer

from .cli_eval_attention import budget, mass
from .cli_eval_drift import kl, pareto, ppl
from .cli_eval_prefill import prefill
from .cli_eval_tasks import needle, ruler

evaluation = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure what Twilight costs in quality, beside the dense model, Transformers' caches and other policies.\n\n"
    "Start with [bold]hf-twilight eval pareto --small --out results[/bold]: its figure says which preset to use.",
)
for command in (ppl, kl, pareto, mass, budget, prefill, needle, ruler):
    evaluation.command(command.__name__)(command)
