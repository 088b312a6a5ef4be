"""The launches of the kernels in triton: compiled for the GPU on first use, by the compiler that comes with triton."""

from __future__ import annotations

import os
from functools import lru_cache

import torch
from torch import Tensor

from .launched import Launches, Walk, layout_tensors, on_device, power_of_two, try_out
from .layout import GridLayout

_RUN = 32
"""Neighbouring samples whose gradients are summed before they are added to the table."""
_RAYS, _AHEAD = 8, 32
"""Rays of a program, and samples of each that it looks at together."""


@lru_cache(maxsize=8)
def check(device: torch.device) -> None:
    """Raise ImportError or RuntimeError, with the reason, where these kernels cannot run."""
    if device.type != "cuda":
        raise RuntimeError("they need a CUDA device")
    if torch.cuda.get_device_capability(device) < (7, 0):
        raise RuntimeError("they need compute capability 7.0 or newer")
    from . import triton_source  # noqa: F401, an ImportError is the answer

    try_out(LAUNCHES, device)  # triton builds its launcher with the system's C compiler: missing, that shows here only


def _fused() -> bool:
    """Is the code compiled (True), or interpreted on the CPU for tests?"""
    return os.environ.get("TRITON_INTERPRET") != "1"


def _constants(layout: GridLayout) -> dict:
    return {
        "L": len(layout.levels),
        "D": layout.n_dims,
        "F": layout.n_features,
        "FP": power_of_two(layout.n_features),
        "FUSED": _fused(),
    }


def _encode(x: Tensor, table: Tensor, out: Tensor, layout: GridLayout, n_levels: int) -> None:
    from . import triton_source as source

    whole = layout.n_features == power_of_two(layout.n_features)
    block, levels = 128, 4 if whole else 1  # measured
    with on_device(x.device):
        source.hash_forward[(-(-len(x) // block), -(-n_levels // levels))](
            x, table, out, *layout_tensors(layout, x.device), len(x), n_levels,
            **_constants(layout), BLOCK=block, LEVELS=levels, num_warps=4,
        )  # fmt: skip


def _encode_to_table(x: Tensor, grad: Tensor, grad_table: Tensor, layout: GridLayout, n_levels: int) -> None:
    from . import triton_source as source

    runs = max(1, 128 // (2**layout.n_dims * power_of_two(layout.n_features)))  # a number for each thread
    with on_device(x.device):
        source.hash_backward_table[(-(-len(x) // (runs * _RUN)), n_levels)](
            x, grad, grad_table, *layout_tensors(layout, x.device), len(x),
            **_constants(layout), RUNS=runs, LENGTH=_RUN, num_warps=4,
        )  # fmt: skip


def _encode_to_points(
    x: Tensor, table: Tensor, grad: Tensor, grad_x: Tensor, layout: GridLayout, n_levels: int
) -> None:
    from . import triton_source as source

    block = 128
    with on_device(x.device):
        source.hash_backward_points[(-(-len(x) // block),)](
            x, table, grad, grad_x, *layout_tensors(layout, x.device), len(x), n_levels,
            **_constants(layout), BLOCK=block, num_warps=4,
        )  # fmt: skip


def _march(
    walk: Walk, marks: Tensor, counts: Tensor, ray: Tensor, t_starts: Tensor, t_ends: Tensor, write: bool
) -> None:
    from . import triton_source as source

    n_rays, at_once, ahead = len(walk.first), 16, 32
    with on_device(marks.device):
        source.march[(-(-n_rays // at_once),)](
            walk.first, walk.last, walk.start, walk.slope, marks if walk.moved is None else walk.moved, marks,
            walk.first if walk.cells is None else walk.cells, counts, ray, t_starts, t_ends,
            n_rays, len(marks), walk.resolution, walk.half_step,
            OCCUPIED=walk.cells is not None, MOVED=walk.moved is not None, WRITE=write, FUSED=_fused(),
            RAYS=at_once, K=ahead, num_warps=4,
        )  # fmt: skip


def _composite(density: Tensor, values: Tensor, *tensors: Tensor) -> None:
    from . import triton_source as source

    n_rays, n_columns = tensors[-1].shape
    with on_device(density.device):
        source.composite_forward[(-(-n_rays // _RAYS),)](
            density, values, *tensors, n_rays,
            K=n_columns, KP=power_of_two(n_columns), RAYS=_RAYS, C=_AHEAD, num_warps=2,
        )  # fmt: skip


def _composite_back(density: Tensor, values: Tensor, t_starts: Tensor, t_ends: Tensor, bounds: Tensor, *more: Tensor):
    from . import triton_source as source

    n_rays = len(bounds) - 1
    with on_device(density.device):
        source.composite_backward[(-(-n_rays // _RAYS),)](
            density, values, t_starts, t_ends, bounds, *more,
            n_rays, K=values.shape[1], RAYS=_RAYS, C=_AHEAD, num_warps=2,
        )  # fmt: skip


def _sum_rays(values: Tensor, bounds: Tensor, sums: Tensor) -> None:
    from . import triton_source as source

    n_rays, n_columns = sums.shape
    with on_device(values.device):
        source.sum_rays[(-(-n_rays // _RAYS),)](
            values, bounds, sums, n_rays, K=n_columns, RAYS=_RAYS, C=_AHEAD, num_warps=2
        )


LAUNCHES = Launches(
    "triton", _encode, _encode_to_table, _encode_to_points, _march, _composite, _composite_back, _sum_rays
)
