"""The inner loops of the method, as a record of functions, and the one place that chooses between backends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import PUBLISHED_GROWTH, GridLayout, GridLevel, grid_layout

__all__ = [
    "PUBLISHED_GROWTH",
    "GridLayout",
    "GridLevel",
    "KernelStatus",
    "Kernels",
    "grid_layout",
    "kernel_status",
    "select_kernels",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """The functions a backend provides; signatures and shapes are those of `torch_kernels`."""

    name: str
    hash_encode: Callable[..., Tensor]
    march_rays: Callable[..., tuple[Tensor, Tensor, Tensor]]
    march_into: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    composite: Callable[..., tuple[Tensor, Tensor]]
    accumulate: Callable[..., Tensor]
    mlp: Callable[..., Tensor]


def _triton_kernels(device: torch.device) -> Kernels:
    from . import triton_kernels as t
    from .triton_mlp import mlp

    t.check(device)
    return Kernels("triton", t.hash_encode, t.march_rays, t.march_into, t.composite, t.accumulate, mlp)


def _cuda_kernels(device: torch.device) -> Kernels:
    from . import cuda_kernels as c
    from . import torch_kernels as t

    c.check(device)
    return Kernels("cuda", c.hash_encode, t.march_rays, t.march_into, c.composite, c.accumulate, t.mlp)


def _torch_kernels(device: torch.device) -> Kernels:
    from . import torch_kernels as t

    return Kernels("torch", t.hash_encode, t.march_rays, t.march_into, t.composite, t.accumulate, t.mlp)


_BACKENDS: dict[str, Callable[[torch.device], Kernels]] = {
    "triton": _triton_kernels,
    "cuda": _cuda_kernels,
    "torch": _torch_kernels,
}
"""Preferred first. Each raises ImportError or RuntimeError, with the reason, where it cannot run on a device."""


@dataclass(frozen=True)
class KernelStatus:
    """Whether a backend can run on a device; `reason` says why not, or is empty."""

    name: str
    usable: bool
    reason: str


def kernel_status(device: torch.device | str) -> list[KernelStatus]:
    """Try every backend on a device, the preferred one first."""
    found = []
    for name, backend in _BACKENDS.items():
        try:
            backend(torch.device(device))
            found.append(KernelStatus(name, True, ""))
        except (ImportError, RuntimeError) as reason:
            found.append(KernelStatus(name, False, str(reason)))
    return found


def select_kernels(device: torch.device | str = "cpu", prefer: str = "auto") -> Kernels:
    """Choose the kernels for a device: the fastest that works ("auto"), or the named one, which fails loudly."""
    device = torch.device(device)
    if prefer != "auto" and prefer not in _BACKENDS:
        raise ValueError(f"unknown kernels {prefer!r}: choose one of {', '.join(('auto', *_BACKENDS))}")
    for name in _BACKENDS if prefer == "auto" else (prefer,):
        try:
            kernels = _BACKENDS[name](device)
        except (ImportError, RuntimeError) as reason:
            if prefer != "auto":
                raise ValueError(f"the {name} kernels cannot run on {device}: {reason}") from reason
            logger.info("%s kernels passed over on %s: %s", name, device, reason)
            continue
        logger.info("%s kernels chosen on %s", name, device)
        return kernels
    raise ValueError(f"no kernels can run on {device}")
