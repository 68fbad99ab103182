"""Options that commands share, each with its one help text."""

from __future__ import annotations

from typing import Annotated

import typer

NO_CHANGES: list[str] = []  # typer makes its own copy

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="'smollm2' (embedded), a folder of save_pretrained, or an id on the Hub."),
]
Dtype = Annotated[str, typer.Option(help="Of the weights: auto (the checkpoint's), float32, bfloat16 or float16.")]
Preset = Annotated[
    str,
    typer.Option(
        help="exact: as the stock cache, bit for bit. quality, balanced, compact: ever smaller and faster. "
        "Or a folder that calibrate wrote."
    ),
]
Set = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="A setting on top of the preset, as p=0.9; repeatable."),
]
Seed = Annotated[int, typer.Option(help="Of all random numbers.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's own choice.")]
Json = Annotated[bool, typer.Option("--json", help="Also print one JSON object as the last line of stdout.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Log what is done; -vv adds tracebacks.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Log errors only.")]
