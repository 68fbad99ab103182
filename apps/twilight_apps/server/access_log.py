"""One line a request on stderr, unless it shall be quiet."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .gate import access_log


@contextmanager
def access_logged(verbose: int, quiet: bool) -> Iterator[None]:
    """Show the access log while something is served.

    Args:
        verbose: from 1 on, probes (``/health``, ``/metrics``) too.
        quiet: show nothing.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    access_log.propagate = False
    access_log.addHandler(handler)
    access_log.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        access_log.removeHandler(handler)
        access_log.setLevel(logging.NOTSET)
        access_log.propagate = True
