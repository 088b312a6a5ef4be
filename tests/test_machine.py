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


OF_MAIN_MEMORY = """
import torch
from dream4d_engine.machine import available_memory, failing_allocations

free = available_memory()
with failing_allocations():
    torch.empty(free // 2, dtype=torch.uint8)
    try:
        torch.empty(free, dtype=torch.uint8)
    except RuntimeError as error:
        print("can't allocate memory" in str(error))
print(torch.empty(free, dtype=torch.uint8).nbytes == free)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that ends processes instead")
def test_what_main_memory_does_not_hold_fails_while_told_to():
    """Nothing is written into what is asked for, so none of it is taken."""
    command = [sys.executable, "-c", OF_MAIN_MEMORY]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert said.split() == ["True", "True"]
