"""The inner loops of the method, as a record of functions, and the one place that chooses between backends."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import metadata
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..machine import must_be_able
from .layout import PUBLISHED_GROWTH, GridLayout, GridLevel, grid_layout

if TYPE_CHECKING:
    from .launched import Launches

__all__ = [
    "PUBLISHED_GROWTH",
    "GridLayout",
    "GridLevel",
    "KernelStatus",
    "Kernels",
    "grid_layout",
    "kernel_status",
    "select_kernels",
    "triton_command",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """The functions a backend provides; signatures and shapes are those of `torch_kernels`."""

    name: str
    hash_encode: Callable[..., Tensor]  # points -> features of a multiresolution grid
    march_rays: Callable[..., tuple[Tensor, Tensor, Tensor]]  # rays -> intervals in the box and in occupied cells
    march_into: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]  # the same in lists of a given length
    composite: Callable[..., tuple[Tensor, Tensor]]  # samples -> their weights, and weighted sums along rays
    accumulate: Callable[..., Tensor]  # samples -> sums along rays
    mlp: Callable[..., Tensor]  # features -> outputs of a bias-free ReLU network


def _triton_kernels(device: torch.device) -> Kernels:
    from . import triton_kernels as t
    from .launched import functions
    from .triton_mlp import mlp

    t.check(device)
    return Kernels("triton", *functions(_with_gradients_of_nvrtc(t.LAUNCHES, device)), mlp)


def _with_gradients_of_nvrtc(launches: Launches, device: torch.device) -> Launches:
    """These launches with the encoding's gradients in CUDA C++, which are faster, where they can be compiled.

    They are first compiled when a gradient is asked for: who only looks at a scene doesn't wait for it.
    """

    @cache  # a compiler that fails is not asked again in each step
    def faster() -> Launches:
        from . import nvrtc_kernels as n

        try:
            n.check(device)
        except (ImportError, RuntimeError) as reason:
            must_be_able(reason, "the encoding's gradients")
            _note(logging.INFO, f"the encoding's gradients stay {launches.name}'s on {device}: {_why(reason)}")
            return launches
        return n.LAUNCHES

    def to_table(*given) -> None:
        faster().encode_to_table(*given)

    def to_points(*given) -> None:
        faster().encode_to_points(*given)

    return replace(launches, encode_to_table=to_table, encode_to_points=to_points)


def _nvrtc_kernels(device: torch.device) -> Kernels:
    from . import nvrtc_kernels as n
    from .launched import functions
    from .lean_mlp import mlp

    n.check(device)
    return Kernels("nvrtc", *functions(n.LAUNCHES), mlp)


def _cuda_kernels(device: torch.device) -> Kernels:
    from . import cuda_kernels as c
    from . import torch_kernels as t

    c.check(device)
    return Kernels("cuda", c.hash_encode, t.march_rays, t.march_into, c.composite, c.accumulate, t.mlp)


def _numba_kernels(device: torch.device) -> Kernels:
    from . import numba_kernels as n
    from . import torch_kernels as t

    n.check(device)  # the networks stay PyTorch's: its matrix products are as fast as a CPU can do them
    return Kernels("numba", n.hash_encode, n.march_rays, t.march_into, n.composite, n.accumulate, t.mlp)


def _torch_kernels(device: torch.device) -> Kernels:
    from . import torch_kernels as t

    return Kernels("torch", t.hash_encode, t.march_rays, t.march_into, t.composite, t.accumulate, t.mlp)


_BACKENDS: dict[str, Callable[[torch.device], Kernels]] = {
    "triton": _triton_kernels,
    "nvrtc": _nvrtc_kernels,
    "cuda": _cuda_kernels,
    "numba": _numba_kernels,
    "torch": _torch_kernels,
}
"""Preferred first. Each raises ImportError or RuntimeError, with the reason, where it cannot run on a device."""

_FAST_ON_GPUS = {"triton", "nvrtc"}


@dataclass(frozen=True)
class KernelStatus:
    """Whether a backend can run on a device."""

    name: str
    usable: bool
    reason: str  # why not; empty where it can


_TRITON_OF_TORCH = {
    (2, 4): (3, 0),
    (2, 5): (3, 1),
    (2, 6): (3, 2),
    (2, 7): (3, 3),
    (2, 8): (3, 4),
    (2, 9): (3, 5),
    (2, 10): (3, 6),
    (2, 11): (3, 6),
    (2, 12): (3, 7),
    (2, 13): (3, 7),
    (2, 14): (3, 8),
}
"""The triton that each torch was made with, as its Linux wheels require; another one may not fit it."""


def triton_command(torch_version: str = torch.__version__, platform: str = sys.platform) -> str:
    """Return what to type to have triton beside a torch of this version."""
    found = re.match(r"(\d+)\.(\d+)", torch_version)
    made_with = (_TRITON_OF_TORCH.get((int(found[1]), int(found[2]))) if found else None) or _required_triton()
    name = "triton-windows" if platform == "win32" else "triton"  # its newest fits the newest torch alone: a bound
    return f'pip install "{name}<{made_with[0]}.{made_with[1] + 1}"' if made_with else f"pip install {name}"


def _required_triton() -> tuple[int, int] | None:
    """The triton that the installed torch's own description asks for: of a torch newer than all we know."""
    try:
        lines = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        lines = []
    found = next(filter(None, (re.match(r"triton\s*[=~]=\s*(\d+)\.(\d+)", line) for line in lines)), None)
    return (int(found[1]), int(found[2])) if found else None


def _why(reason: ImportError | RuntimeError) -> str:
    """Why a backend can't run, with the command that helps."""
    missing = (reason.name or "").partition(".")[0] if isinstance(reason, ImportError) else ""
    if missing == "triton":
        return f"triton is not installed; with it a step takes a fraction of the time: {triton_command()}"
    if missing == "numba":
        return "numba is not installed; with it a step on a CPU takes a fraction of the time: pip install numba"
    return str(reason)


def kernel_status(device: torch.device | str) -> list[KernelStatus]:
    """Try every backend on a device, the preferred one first."""
    found = []
    for name, backend in _BACKENDS.items():
        try:
            backend(torch.device(device))
            found.append(KernelStatus(name, True, ""))
        except (ImportError, RuntimeError) as reason:
            found.append(KernelStatus(name, False, _why(reason)))
    return found


def select_kernels(device: torch.device | str = "cpu", prefer: str = "auto") -> Kernels:
    """Choose the kernels for a device: the fastest that works ("auto"), or the named one, which fails loudly.

    The log says once a process what was chosen and what was passed over; a GPU that is left with kernels which take
    several times as long is a warning.
    """
    device = torch.device(device)
    if prefer != "auto" and prefer not in _BACKENDS:
        raise ValueError(f"unknown kernels {prefer!r}: choose one of {', '.join(('auto', *_BACKENDS))}")
    passed_over: dict[str, str] = {}
    for name in _BACKENDS if prefer == "auto" else (prefer,):
        try:
            kernels = _BACKENDS[name](device)
        except (ImportError, RuntimeError) as reason:
            must_be_able(reason, f"the {name} kernels")
            if prefer != "auto":
                raise ValueError(f"the {name} kernels cannot run on {device}: {_why(reason)}") from reason
            passed_over[name] = _why(reason)
            continue
        slow = device.type == "cuda" and name not in _FAST_ON_GPUS
        for other, why in passed_over.items():
            level = logging.WARNING if slow and other in _FAST_ON_GPUS else logging.INFO
            _note(level, f"{other} kernels passed over on {device}: {why}")
        _note(logging.INFO, f"{name} kernels chosen on {device}")
        return kernels
    raise ValueError(f"no kernels can run on {device}")


@lru_cache(maxsize=256)
def _note(level: int, line: str) -> None:
    """Log a line, once a process: every scene chooses its kernels, and every node has scenes."""
    logger.log(level, "%s", line)
