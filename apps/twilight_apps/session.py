"""What every command begins and ends with: allocator, logging, threads, seed, one-line errors and exit codes."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from .heap import keep_large_blocks
from .tables import side_output

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
LOGGERS = ("hf_twilight", "twilight_kernels", "twilight_cache", "twilight_apps", "uvicorn")
# what a user can mend; anything else is a fault of ours and keeps its traceback
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, MemoryError, ArithmeticError)


@contextmanager
def session(
    *, verbose: int = 0, quiet: bool = False, seed: int | None = None, threads: int | None = None
) -> Iterator[None]:
    """Run a command: set allocator, logging, threads and seed; turn errors into one line and an exit status.

    Args:
        verbose: 1 logs what is done, 2 adds details and tracebacks.
        quiet: show errors only.
        seed: of torch's random numbers; None leaves them.
        threads: CPU threads of torch and of our kernels; None leaves them.
    Raises:
        typer.Exit: status 2 after an error, 130 after Ctrl-C.
    """
    keep_large_blocks()
    try:
        with _logging(verbose, quiet):
            if threads is not None or seed is not None:
                _set_torch(seed, threads)
            yield
    except KeyboardInterrupt:
        side_output().print("interrupted", highlight=False)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_ERROR) from None
    except USER_ERRORS as error:
        if verbose >= 2:
            traceback.print_exc()
        line = f"error: {message(error)}"
        side_output().print(line, style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_ERROR) from None


def message(error: BaseException) -> str:
    """Write an exception as one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


@contextmanager
def _logging(verbose: int, quiet: bool) -> Iterator[None]:
    """Show our loggers' records on stderr; afterwards the loggers are as they were."""
    from rich.logging import RichHandler

    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = RichHandler(console=side_output(), show_path=verbose >= 2, markup=False)
    if not verbose:
        # Transformers reads these when it is imported; its own bar and hints are not ours
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (old_level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(old_level)
            logger.propagate = propagate


def _set_torch(seed: int | None, threads: int | None) -> None:
    import torch

    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if seed is not None:
        torch.manual_seed(seed)
