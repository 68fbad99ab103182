"""Peak resident memory of a piece of work, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Give freed memory back and forget the peak so far; does nothing but on Linux."""
    gc.collect()
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not every C library has it
    if trim is not None:
        trim(0)
    _CLEAR.write_text("5", encoding="ascii")  # resets VmHWM, see proc_pid_clear_refs(5)


def peak_bytes() -> int | None:
    """Most memory that was resident since ``reset_peak``, the model included; None but on Linux."""
    if sys.platform != "linux":
        return None
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
