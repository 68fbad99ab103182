"""``hf-twilight bench aot`` and ``gpu``: the command lines of what concerns GPUs only."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .environment import print_json
from .session import session

CAPABILITIES = [80, 90, 100]
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

    Exit status: 1 if one spills, needs more shared memory than a chip has, or does not compile.

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
