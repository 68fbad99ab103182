"""Compiling workers."""

from __future__ import annotations

import ctypes
import importlib.util
import signal
from pathlib import Path
from typing import Any

import pytest

registry = pytest.importorskip("numba.core.registry")


def test_compile_worker_can_be_interrupted_and_called_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while LLVM calls back would be swallowed there, and the kernel be without its code."""
    from twilight_kernels._numba_pool import compile_worker

    path = tmp_path / "fresh.py"  # that no cache knows
    path.write_text("def body(block):\n    block[1] = 7\n")
    spec = importlib.util.spec_from_file_location("fresh", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    engine = registry.cpu_target.target_context.codegen()._engine._ee
    notify = engine._object_cache_notify

    def pressed(*compiled: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        notify(*compiled)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # an earlier test's server may have left its own
    try:
        with monkeypatch.context() as patched:
            patched.setattr(engine, "_object_cache_notify", pressed)
            with pytest.raises(KeyboardInterrupt):
                compile_worker(module.body, "fresh")
    finally:
        signal.signal(signal.SIGINT, before)
    block = (ctypes.c_int64 * 2)()
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compile_worker(module.body, "fresh"))(ctypes.addressof(block))
    assert block[1] == 7
