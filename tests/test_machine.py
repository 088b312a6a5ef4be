"""What the machine is asked for."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
from places import ROOT

PAGES_OF_A_ROUND = """
import ctypes, resource, sys
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "kept":
    from dream4d_engine.machine import keep_freed_memory

    keep_freed_memory()

def use():
    held = [libc.malloc(24 * 2**20) for _ in range(4)]
    for block in held:
        ctypes.memset(block, 1, 24 * 2**20)
    for block in held:
        libc.free(block)

use(), use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_freed_memory_is_kept_for_the_next_step():
    """Two thirds of 96 MiB, in pages of 4 KiB, are lent again by the system in every round; then none."""
    pages = {}
    for how in ("as it is", "kept"):
        command = [sys.executable, "-c", PAGES_OF_A_ROUND, how]
        pages[how] = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert pages["kept"] < 100 < 10_000 < pages["as it is"]
