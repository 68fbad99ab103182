"""What the commands tell the allocator, seen in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys, threading
from twilight_apps.heap import keep_large_blocks
if "keep" in sys.argv: keep_large_blocks()
counted = []
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        block = ctypes.create_string_buffer(48 << 20)
        del block
    counted.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=touch)
thread.start()
thread.join()
print(*counted)
"""


def _faults(*arguments: str, **environment: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_large_blocks_of_a_thread_are_got_once_unless_the_environment_says_otherwise() -> None:
    once = (48 << 20) // os.sysconf("SC_PAGESIZE")
    assert _faults() > 7 * once
    assert _faults("keep") < 2 * once
    assert _faults("keep", MALLOC_MMAP_THRESHOLD_="131072") > 7 * once
