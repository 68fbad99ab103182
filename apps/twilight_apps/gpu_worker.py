"""Calls in a child process: one that crashes, hangs or ruins its CUDA context ends itself and nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

_STOP_S = 5.0


class CallError(Exception):
    """The child raised, as ``Type: message``, or died."""


class Worker:
    """One child process, begun when it is first needed, and anew after it died.

    It is spawned, not forked: a forked child of a process that saw CUDA cannot use it.
    """

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None

    def call(self, function: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
        """Return what the child's call returned.

        Args:
            function: by its name in a module, as are its arguments: both are pickled.
            limit_s: seconds after which the child is killed, its start included.
        Raises:
            TimeoutError: no answer within ``limit_s``; the child is gone.
            CallError: the call raised, and the child lives on, or the child died.
        """
        if self._process is None:
            self._begin()
        self._connection.send((function, arguments))
        if not self._connection.poll(limit_s):
            self.stop()
            raise TimeoutError(f"no answer within {limit_s:.0f} s")
        try:
            value, error = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(_STOP_S)
            code = self._process.exitcode
            self.stop()
            raise CallError(f"the process died with exit code {code}") from None
        if error is not None:
            raise CallError(error)
        return value

    def stop(self) -> None:
        """Kill the child, if there is one; the next call begins another."""
        if self._process is None:
            return
        self._connection.close()
        self._process.kill()
        self._process.join(_STOP_S)  # what hangs in a driver may stay: it must not hold us up
        self._process = self._connection = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()


def _serve(connection: Connection) -> None:
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        value, told = None, None
        try:
            value = function(*arguments)
        except Exception as error:  # told to the parent, whatever it is
            told = f"{type(error).__name__}: {error}"
        connection.send((value, told))
