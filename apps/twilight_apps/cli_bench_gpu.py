"""``hf-twilight bench aot`` and ``gpu``: the command lines of what concerns GPUs only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .environment import print_json
from .session import session

CAPABILITIES = [80, 90, 100]
PARTS = ["check", "decode", "step", "prefill", "generate", "memory"]
EXIT_FAULT = 1


def aot(
    capabilities: Annotated[
        list[int], typer.Option("--capability", help="80 (A100), 90 (H100, H200), 100 (B200); repeatable.")
    ] = CAPABILITIES,
    only: Annotated[str, typer.Option(help="Compile only configurations whose name contains this.")] = "",
    json: options.Json = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Compile every GPU kernel at realistic configurations, without a GPU: registers, shared memory, spills.

    Exit status: 1 if one spills, needs more shared memory than a chip has, waits for each product of tensor cores, or
    does not compile.

    \b
    Example:
      hf-twilight bench aot --capability 90 --json
    """
    with session(verbose=verbose, quiet=quiet):
        from .bench_aot import run

        result = run(capabilities, only)
        if json:
            print_json("bench aot", **result)
    if result["faults"]:
        raise typer.Exit(EXIT_FAULT)


def gpu(
    out: Annotated[Path, typer.Option(help="Folder for bench-gpu.json; what passed in it already is kept.")],
    parts: Annotated[
        list[str],
        typer.Option("--part", help="check, decode, step, prefill, generate or memory; repeatable. Default: all."),
    ] = PARTS,
    toy: Annotated[
        bool, typer.Option("--toy", help="Walk the whole path at toy sizes on the CPU; nothing is measured.")
    ] = False,
    budget_s: Annotated[float, typer.Option(help="Seconds that all may take; the next call goes on.")] = 570.0,
    unit_s: Annotated[float, typer.Option(help="Seconds that one unit may take, compilation included.")] = 200.0,
    seed: options.Seed = 0,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Check every kernel against float64 on a GPU, then time it against the fastest dense attention there.

    One layer's decode (8,000 to 131,000 tokens, 1 to 64 requests) and prefill at the shape of an 8B model, a whole
    decode step of such a model at 131,072 tokens, and the cache of a million tokens beside its weights. Needs no
    network and no weights.

    Every unit (a check of a kernel, a context and batch, a prompt's length, a preset) passes or fails by itself and is
    written when it ends. Call again with the same folder to go on: what failed is tried again, what passed is not.

    Exit status: 1 if anything failed; what is wrong is not timed.

    \b
    Examples:
      hf-twilight bench gpu --out results
      python -m twilight_apps.bench gpu --out results --part decode
      TRITON_INTERPRET=1 HF_TWILIGHT_BACKEND=triton hf-twilight bench gpu --out /tmp/toy --toy
    """
    with session(verbose=verbose, quiet=quiet, seed=seed):
        from .bench_gpu import run

        result = run(out, parts, is_toy=toy, budget_s=budget_s, unit_s=unit_s, seed=seed)
    if any(unit["message"] for unit in result["units"]):
        raise typer.Exit(EXIT_FAULT)
