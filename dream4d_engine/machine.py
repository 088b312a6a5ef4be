"""What the program asks of the machine it runs on: a device, memory, room on the disk, versions."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from .documents import describe, is_text


def pick_device(wish: str = "auto") -> torch.device:
    """Return the device to work on: "auto" takes cuda, then mps, then cpu; a wish that can't be met is an error.

    A number behind a colon chooses one of several: "cuda:1".
    """
    counts = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    counts |= {"mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if wish == "auto":
        return torch.device(next(kind for kind, count in counts.items() if count))
    kind, colon, number = wish.partition(":")
    if kind not in counts:
        raise ValueError(f"unknown device {describe(wish)}: choose auto, cuda, mps or cpu")
    if not counts[kind]:
        raise ValueError(f"device {describe(wish)} is not available here: choose auto or cpu")
    if not colon:
        return torch.device(kind)
    there = f"{kind}:0" if counts[kind] == 1 else f"{kind}:0 to {kind}:{counts[kind] - 1}"
    if not re.fullmatch("[0-9]{1,9}", number):
        raise ValueError(f"unknown device {describe(wish)}: a number stands behind the colon, here {there}")
    if int(number) >= counts[kind]:
        raise ValueError(f"device {describe(wish)} is not there: this machine has {there}")
    return torch.device(kind, int(number))


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"dream4d": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes this process has held: on the GPU for cuda, else resident memory; None if unknown.

    What CUDA graphs keep for their next replay counts, though the allocator calls it free.
    """
    if device.type == "cuda":
        kept = 0
        if has_own_allocator():  # else there are no graphs
            segments = [s for s in torch.cuda.memory_snapshot() if s["device"] == (device.index or 0)]
            of_graphs = (s for s in segments if tuple(s["segment_pool_id"]) != (0, 0))  # pools of their own
            kept = sum(s["total_size"] - s["allocated_size"] for s in of_graphs)
        return torch.cuda.max_memory_allocated(device) + kept
    try:
        import resource
    except ImportError:  # Windows has no such module
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def keep_freed_memory(n_bytes: int = 2**29) -> None:
    """Let the C library hold up to so much of what is freed for who asks next, where it can be told to (glibc).

    A step frees and asks for the same tens of MiB again and again. Else they go back to the system each time, which
    clears every page that it lends: a tenth of a denoiser's time on a CPU (measured).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another system, or another C library
        return
    mallopt(-1, n_bytes)  # M_TRIM_THRESHOLD
    mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest: what is larger goes back in any case


def limit_memory(device: torch.device, n_bytes: float | None, of: float | None = None) -> None:
    """Let this process take no more than so many bytes of a GPU (None: all there is).

    `of`: as many as it may take later, which is what `allowed_memory` says.
    """
    index = _index(device)
    total = torch.cuda.get_device_properties(index).total_memory

    def share(n: float | None) -> float:
        return 1.0 if n is None else min(1.0, max(n, 2**20) / total)

    _SHARES[index] = share(n_bytes if of is None else of)
    torch.cuda.set_per_process_memory_fraction(share(n_bytes), index)


_SHARES: dict[int, float] = {}
"""Of a GPU's memory, by its number, what `limit_memory` was told."""


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def allowed_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that this process may take: all there is, if nothing limits it."""
    total = torch.cuda.get_device_properties(device).total_memory
    return round(total * _SHARES.get(_index(device), 1.0))


def has_own_allocator() -> bool:
    """Whether PyTorch manages the GPU's memory itself, not CUDA for it (`backend:cudaMallocAsync`, as ComfyUI asks).

    Triton's kernels can't be captured as part of a CUDA graph there, and the allocator can't be looked into.
    """
    return torch.cuda.get_allocator_backend() == "native"


def available_memory() -> int | None:
    """Return the bytes of main memory that can still be taken, or None where the system doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def check_memory(n_bytes: int, what: str, way_out: str) -> None:
    """Raise a ValueError when `what` needs more main memory than there is."""
    free = available_memory()
    if free is not None and n_bytes > free:
        raise ValueError(f"{what} needs about {n_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: {way_out}")


def lacks_memory(error: BaseException) -> bool:
    """Whether something failed for want of memory, which says nothing else of what was tried."""
    # CUDA's driver and libraries raise a bare RuntimeError that only its text tells apart
    on_gpu = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
    return on_gpu or lacks_main_memory(error)


def lacks_main_memory(error: BaseException) -> bool:
    """The same, where it was main memory and not a GPU's."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)  # which raises a bare RuntimeError


def must_be_able(error: BaseException, what: str) -> None:
    """Raise torch.OutOfMemoryError where trying something out failed for want of memory, and return where it didn't.

    A full card is no answer to whether `what` works, and the answer is mostly kept for the whole process.
    """
    if lacks_memory(error):
        raise torch.OutOfMemoryError(f"while {what} were tried out: {error}") from error


@contextmanager
def failing_allocations() -> Iterator[None]:
    """Let what takes more main memory than is free now fail, where Linux would end the whole process later."""
    free = available_memory()
    if free is None:
        yield
        return
    import resource  # where /proc is, this is

    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmData:\s+(\d+) kB", status)  # what RLIMIT_DATA counts
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(0.95 * free) + (int(found[1]) * 1024 if found else 0)  # others want some, too
    limits = [limit, *(bound for bound in before if bound != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def check_folder(folder: Path, n_bytes: int, otherwise: str = "choose another --out") -> None:
    """Make `folder` if needed and make sure that files of `n_bytes` in all can be written there.

    Raises a ValueError that names the folder when it can't be made, can't be written, or the disk is too full, and
    says what to do `otherwise`.
    """
    if not is_text(folder):  # safetensors opens no file there
        raise ValueError(f"the name of {str(folder)!a} is no text in UTF-8: rename it, or {otherwise}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"dream4d")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"can't write into {folder}: {error.strerror or error}; {otherwise}") from error
    if free < n_bytes:
        raise ValueError(
            f"{folder} has {free / 2**20:.0f} MiB left, the run needs about {n_bytes / 2**20:.0f} MiB: "
            f"free some room or {otherwise}"
        )


class WriteError(OSError):
    """A file that could not be written: which one, why, and the way out."""


_WAYS_OUT = {
    errno.ENOSPC: "the disk is full, free some room there",
    errno.EDQUOT: "your share of the disk is used up, free some room there",
    errno.EFBIG: "files may not grow so large there",
    errno.EROFS: "nothing can be written there, choose another place",
    errno.EACCES: "you may not write there, change that or choose another place",
    errno.EPERM: "you may not write there, change that or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def write_error(path: Path, reason: Exception) -> WriteError:
    """What to say where `path` could not be written, from an error of the system or one with its number."""
    if isinstance(reason, WriteError):
        return reason
    number = getattr(reason, "errno", 0)
    why = getattr(reason, "strerror", None) or str(reason)
    kept = "; what it held before is kept" if path.exists() else ""
    return WriteError(f"{path} can't be written: {why} ({_WAYS_OUT.get(number, 'is the place still there?')}){kept}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write a file to, which then takes the place of `path`, flushed to the disk.

    Where something fails nothing stays of it, and what was at `path` stays; an OSError becomes a WriteError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # first: it may be what fills the disk
            temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file (see `replacing`); raises WriteError."""
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        file.write(data)
