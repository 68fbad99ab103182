"""Tables, notes and progress bars for people: tables on stdout, progress on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PIPE_WIDTH = 132  # of lines where no terminal says how wide it is


def output() -> Console:
    """Return the console of results, stdout."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=_PIPE_WIDTH)


def side_output() -> Console:
    """Return the console of progress, logs and errors, stderr."""
    plain = Console(stderr=True)
    return plain if plain.is_terminal else Console(stderr=True, width=_PIPE_WIDTH)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> None:
    """Print a table; the first ``left`` columns are words, the others figures."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    output().print(table)


def say(text: str) -> None:
    """Print a line for people on stdout, as it is: no markup, no highlighting."""
    output().print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: int) -> Iterator[Progress]:
    """Show a bar on stderr; advance it with ``bar.advance(bar.task_ids[0])``."""
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("passed,"), TimeRemainingColumn(), TextColumn("left"),
    )  # fmt: skip
    with Progress(*columns, console=side_output(), transient=True) as bar:
        bar.add_task(description, total=total)
        yield bar


@contextmanager
def layer_progress(model: PreTrainedModel, description: str, forwards: int = 1) -> Iterator[Any]:
    """Show a bar that advances with each decoder layer, so that one long forward is seen to move.

    Yields:
        A function that ends the bar early: what follows (a streamed answer) has the terminal to itself.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    layers = list(layers) if layers is not None else []
    hooks: list[Any] = []
    with progress(description, max(1, len(layers)) * forwards) as bar:
        task = bar.task_ids[0]

        def stop() -> None:
            while hooks:
                hooks.pop().remove()
            bar.stop()

        hooks.extend(layer.register_forward_hook(lambda *_: bar.advance(task)) for layer in layers)
        try:
            yield stop
        finally:
            stop()


def size(num_bytes: float) -> str:
    """Write bytes as MB, one decimal (1 MB is 10^6 bytes)."""
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:,.1f} kB"


def spread(times: dict[str, float]) -> str:
    """Write a summary of ``timing.summary`` as ``median [p20, p80]``."""
    return f"{times['median']:.2f} [{times['p20']:.2f}, {times['p80']:.2f}]"
