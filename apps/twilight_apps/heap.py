"""Large blocks of memory stay in the heap of this process, because getting them anew costs a page fault each 4 KiB.

A forward of a long prompt makes and frees temporaries of tens of megabytes in every layer. By default glibc asks the
system for each and gives it back: a third of the time of 16,000 tokens. The commands own their process and may say
otherwise; a library must not.
"""

from __future__ import annotations

import ctypes
import os
import sys

_SETTINGS = {  # of mallopt(3)
    "MALLOC_MMAP_THRESHOLD_": (-3, 1 << 30),  # blocks below this come from the heap
    "MALLOC_TRIM_THRESHOLD_": (-1, 1 << 30),  # so much may lie free at its end
    "MALLOC_ARENA_MAX": (-8, 1),  # heaps of other threads hold no large blocks
}


def keep_large_blocks() -> None:
    """Tell glibc so, unless the environment says something about its allocator; does nothing but on Linux."""
    if sys.platform != "linux" or not _SETTINGS.keys().isdisjoint(os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every C library has it
    if mallopt is not None:
        for option, value in _SETTINGS.values():
            mallopt(option, value)
