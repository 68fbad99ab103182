"""Run compiled workers on the threads that torch already has.

A worker is a C function ``void worker(int64 *block)``: the block holds addresses and sizes, and its first
number is a ticket counter from which every thread draws its next task. Torch's CPU build loads OpenMP and
keeps one team of threads; the workers run on that very team (``GOMP_parallel`` of the library torch loaded),
so that two pools never fight for the same cores. Where torch's OpenMP cannot be found (Windows, some builds)
the same worker runs on a small pool of Python threads; the call releases the interpreter lock either way.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import pathlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from numba import cfunc, types
from numba.core.event import Event, Listener, install_listener

logger = logging.getLogger(__name__)

BLOCK_SIZE = 64
_PAUSE_SOFT = 1
_WORKER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# numba's cache looks at one file's date; this makes it look at all the files that a worker is made of, and at the
# name that a copy of this package goes by, which compiled code refers to
SOURCE_HASH = int.from_bytes(
    hashlib.sha1(
        __name__.encode()
        + b"".join(
            path.read_bytes()
            for path in sorted(pathlib.Path(__file__).parent.glob("*.py"))
            if path.name.startswith("_numba") or path.name == "layout.py"
        )
    ).digest()[:6],
    "little",
)


def compile_worker(body: Callable[[Any], None], name: str) -> int:
    """Compile ``body``, or load it from numba's cache, and return its address."""
    compiler = cfunc(types.void(types.CPointer(types.int64)), nopython=True, fastmath=True, cache=True)
    # no pass runs if the cache has it; on a thread of its own, for LLVM calls back into Python, where a Ctrl-C that
    # the main thread is handed would be swallowed and leave half a kernel
    with install_listener("numba:run_pass", _Announcement(name)), ThreadPoolExecutor(1) as thread:
        worker = thread.submit(compiler, body).result()
    _ALIVE.append(worker)
    return int(worker.address)


class _Announcement(Listener):
    """Say once that compilation begins: it takes seconds, in which nothing else happens."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def on_start(self, event: Event) -> None:
        if self._name is not None:
            logger.warning("compiling a CPU kernel: %s (once; cached for later runs)", self._name)
            self._name = None

    def on_end(self, event: Event) -> None:
        pass


_ALIVE: list[Any] = []  # compiled code must outlive its address


def run(worker: int, address: int, tasks: int) -> None:
    """Run ``worker`` on the block at ``address``, on as many threads as torch uses, at most one a task.

    Returns when all tasks are done.
    """
    threads = min(torch.get_num_threads(), tasks)
    if threads <= 1:
        _function(worker)(address)
        return
    team = _openmp()
    if team is not None:
        team(worker, address, threads, 0)
        return
    helpers = [_helpers().submit(_function(worker), address) for _ in range(threads - 1)]
    _function(worker)(address)
    for helper in helpers:
        helper.result()


@lru_cache(maxsize=1024)
def _function(worker: int) -> Callable[[int], None]:
    return _WORKER(worker)


class _Scratch(threading.local):
    """One growing buffer a thread: fresh megabytes every step would cost a page fault each 4 KiB."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)


_SCRATCH = _Scratch()


def scratch(num_bytes: int) -> int:
    """Address of ``num_bytes`` uninitialized bytes, 64-byte aligned, valid until this thread's next call."""
    if _SCRATCH.buffer.numel() < num_bytes + 64:
        _SCRATCH.buffer = torch.empty(num_bytes + num_bytes // 4 + 64, dtype=torch.uint8)
    return -(-_SCRATCH.buffer.data_ptr() // 64) * 64


def release_team() -> None:
    """End the threads of the calling thread's OpenMP team; its next parallel region starts them again.

    libgomp lets idle threads spin between regions only as long as all teams together have no more threads than there
    are cores. A second thread that computes therefore pays for the team of the first, even if that is idle: each of
    the hundreds of regions of a decode step then begins with waking threads.
    """
    library = _libgomp()
    if library is not None and hasattr(library, "omp_pause_resource_all"):
        library.omp_pause_resource_all(_PAUSE_SOFT)


@lru_cache(maxsize=1)
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """``GOMP_parallel`` of the OpenMP library that torch loaded, or None."""
    library = _libgomp()
    if library is None:
        logger.info("torch's OpenMP library has no GOMP_parallel here: CPU kernels run on Python threads")
        return None
    function = library.GOMP_parallel
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    team: Callable[[int, int, int, int], None] = function
    return team


@lru_cache(maxsize=1)
def _libgomp() -> Any:
    """The OpenMP library that torch loaded, if it has ``GOMP_parallel``; never loads a second one."""
    if not hasattr(os, "RTLD_NOLOAD"):  # Windows
        return None
    libraries = pathlib.Path(torch.__file__).parent / "lib"
    for path in [
        *sorted(libraries.glob("lib*omp*")),
        *sorted(libraries.parent.parent.glob("torch.libs/lib*omp*")),
    ]:
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            continue
        if hasattr(library, "GOMP_parallel"):
            return library
    return None


@lru_cache(maxsize=1)
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, torch.get_num_threads() - 1), thread_name_prefix="twilight")
