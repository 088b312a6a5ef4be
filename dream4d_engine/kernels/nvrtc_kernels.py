"""The launches of the kernels in CUDA C++: compiled on first use by NVRTC, for where triton is not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import nvrtc
from . import nvrtc_source as source
from .launched import Launches, Walk, first_line, layout_tensors, try_out
from .layout import GridLayout, grid_layout

_THREADS = 128
"""Of a block."""
_TOGETHER = 4
"""Levels that a thread interpolates: what it writes of them is a whole piece of memory."""
_BESIDE = 4
"""Levels that neighbouring threads add to the table: they read the same piece of the gradient."""
_APART = 2
"""Coordinates of which different threads add to the corners of a cell: one adds to both along the others."""
_RUN = 64
"""Neighbouring samples whose gradients are summed before they are added to the table."""
_AHEAD = 4
"""Of these, so many are read at once."""
NUMBERS = {torch.float32: "float", torch.float16: "f16", torch.bfloat16: "b16"}


@lru_cache(maxsize=8)
def check(device: torch.device) -> None:
    """Raise RuntimeError, with the reason, where these kernels cannot run, or not be compiled."""
    if device.type != "cuda":
        raise RuntimeError("they need a CUDA device")
    if torch.version.hip:
        raise RuntimeError("they are for NVIDIA's GPUs")
    try_out(LAUNCHES, device)
    try:  # what is not asked for until a run has begun
        _marching(device)
        _encoding(grid_layout(3, 4, 2, 4, 2, 2.0), torch.float16, device)
    except Exception as error:
        raise RuntimeError(f"a kernel can't be compiled: {type(error).__name__}: {first_line(error)}") from error


def compile_for(device: torch.device, code: str, names: tuple[str, ...], **defined: object) -> tuple[nvrtc.Kernel, ...]:
    """These functions of the code, with what is defined in front of it."""
    lines = (f"#define {name} {value}\n" for name, value in defined.items())
    return nvrtc.kernels_of(source.INSTRUCTIONS + "".join(lines) + code, names, device)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor where it begins at a place that a GPU can read four numbers at once from, else a copy."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


# ---- hash encoding -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoding:
    """The compiled functions of a kind of grid on a device."""

    forward: nvrtc.Kernel
    table: nvrtc.Kernel
    points: nvrtc.Kernel
    lanes: int  # threads that a run of samples has in the table's


@lru_cache(maxsize=64)
def _encoding(layout: GridLayout, dtype: torch.dtype, device: torch.device) -> _Encoding:
    n_dims, n_features, n_levels = layout.n_dims, layout.n_features, len(layout.levels)
    together, beside, both = min(_TOGETHER, n_levels), min(_BESIDE, n_levels), max(0, n_dims - _APART)
    # pairs of numbers are added at once from compute capability 9.0 on; before, by neighbouring threads
    few = 2 if n_features % 2 == 0 and nvrtc.capability(device) >= (9, 0) else 1
    numbers = 16 // dtype.itemsize  # what a thread reads or writes at once, at most
    forward, table, points = compile_for(
        device, source.HASH, ("hash_forward", "hash_backward_table", "hash_backward_points"),
        D=n_dims, F=n_features, L=n_levels, OUT=NUMBERS[dtype], THREADS=_THREADS, TOGETHER=together,
        PIECE=math.gcd(n_features, 4), PACK=math.gcd(n_levels * n_features, together * n_features, numbers),
        FEW=few, BOTH=both, BESIDE=beside, LENGTH=_RUN, AHEAD=_AHEAD,
    )  # fmt: skip
    return _Encoding(forward, table, points, lanes=2 ** (n_dims - both) * (n_features // few) * beside)


def _encode(x: Tensor, table: Tensor, out: Tensor, layout: GridLayout, n_levels: int) -> None:
    kernel = _encoding(layout, out.dtype, x.device).forward
    grid = (-(-len(x) // _THREADS), -(-n_levels // _TOGETHER))
    kernel(grid, _THREADS, x, _whole(table), out, *layout_tensors(layout, x.device), len(x), n_levels)


def _encode_to_table(x: Tensor, grad: Tensor, grad_table: Tensor, layout: GridLayout, n_levels: int) -> None:
    made = _encoding(layout, grad.dtype, x.device)
    x, grad = _whole(x), _whole(grad)
    grid = (-(-(-(-len(x) // _RUN) * made.lanes) // _THREADS), -(-n_levels // _BESIDE))
    made.table(grid, _THREADS, x, grad, grad_table, *layout_tensors(layout, x.device), len(x), n_levels)


def _encode_to_points(
    x: Tensor, table: Tensor, grad: Tensor, grad_x: Tensor, layout: GridLayout, n_levels: int
) -> None:
    kernel, grid = _encoding(layout, grad.dtype, x.device).points, (-(-len(x) // _THREADS),)
    table, grad = _whole(table), _whole(grad)
    for first in range(0, n_levels, _TOGETHER):  # one after the other, so that their entries stay in the cache
        known = (*layout_tensors(layout, x.device), len(x), n_levels, first)
        kernel(grid, _THREADS, x, table, grad, grad_x, *known)


# ---- rays ----------------------------------------------------------------------------------------------------------


def _blocks(n_rays: int) -> tuple[int]:
    """A ray has 32 threads."""
    return (-(-n_rays * 32 // _THREADS),)


@lru_cache(maxsize=8)
def _marching(device: torch.device) -> nvrtc.Kernel:
    (kernel,) = compile_for(device, source.MARCH, ("march",))
    return kernel


def _march(
    walk: Walk, marks: Tensor, counts: Tensor, ray: Tensor, t_starts: Tensor, t_ends: Tensor, write: bool
) -> None:
    moved, cells = walk.moved, walk.cells
    _marching(marks.device)(
        _blocks(len(walk.first)), _THREADS, walk.first, walk.last, walk.start, walk.slope,
        marks if moved is None else moved, marks, walk.first if cells is None else cells, counts, ray, t_starts, t_ends,
        len(walk.first), len(marks), walk.resolution, walk.half_step, moved is not None, cells is not None, write,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _compositing(n_columns: int, device: torch.device) -> tuple[nvrtc.Kernel, ...]:
    return compile_for(device, source.COMPOSITE, ("composite_forward", "composite_backward", "sum_rays"), K=n_columns)


def _composite(density: Tensor, values: Tensor, *tensors: Tensor) -> None:
    n_rays, n_columns = tensors[-1].shape
    forward, _, _ = _compositing(n_columns, density.device)
    forward(_blocks(n_rays), _THREADS, density, values, *tensors, n_rays)


def _composite_back(density: Tensor, values: Tensor, *tensors: Tensor) -> None:
    _, backward, _ = _compositing(values.shape[1], density.device)
    bounds = tensors[2]
    backward(_blocks(len(bounds) - 1), _THREADS, density, values, *tensors, len(bounds) - 1)


def _sum_rays(values: Tensor, bounds: Tensor, sums: Tensor) -> None:
    n_rays, n_columns = sums.shape
    _, _, kernel = _compositing(n_columns, values.device)
    kernel(_blocks(n_rays), _THREADS, values, bounds, sums, n_rays)


LAUNCHES = Launches(
    "nvrtc", _encode, _encode_to_table, _encode_to_points, _march, _composite, _composite_back, _sum_rays
)
