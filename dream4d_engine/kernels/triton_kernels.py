"""The kernels in triton: compiled for the GPU on first use, by the compiler that comes with triton.

Same functions, shapes and values as `torch_kernels`. Sums over samples are made with atomic additions in the table's
gradient only, so everything else is repeatable. Under autocast the encoding is returned in half precision, as the
networks behind it take it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from . import torch_kernels
from .layout import PRIMES, GridLayout
from .torch_kernels import _lattice, _lattice_range

_RUN = 32
"""Neighbouring samples whose gradients are summed before they are added to the table."""
_MARKS = 4096
"""Lattice points that rays usually stay within; more are made where a camera is farther away."""


@lru_cache(maxsize=8)
def check(device: torch.device) -> None:
    """Raise ImportError or RuntimeError, with the reason, where these kernels cannot run."""
    if device.type != "cuda":
        raise RuntimeError("they need a CUDA device")
    if torch.cuda.get_device_capability(device) < (7, 0):
        raise RuntimeError("they need compute capability 7.0 or newer")
    from . import triton_source  # noqa: F401, an ImportError is the answer

    try:  # triton builds its launcher with the system's C compiler: missing, that shows here only
        nothing = torch.zeros(4, device=device)
        bounds = torch.tensor([0, 4], device=device)
        total = float(_sum(nothing[:, None] + 1, bounds, 1))
    except Exception as error:  # whatever a compiler may raise
        raise RuntimeError(f"a first kernel failed: {type(error).__name__}: {first_line(error)}") from error
    if total != 4:
        raise RuntimeError(f"a first kernel gave {total} instead of 4")


def first_line(error: Exception) -> str:
    """The first line of what a compiler said."""
    return (str(error).strip() or "no message").splitlines()[0][:300]


def _fused() -> bool:
    """Is the code compiled (True), or interpreted on the CPU for tests?"""
    return os.environ.get("TRITON_INTERPRET") != "1"


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _require_float32(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"the triton kernels take {name} in float32, got {tensor.dtype}")


# ---- hash encoding -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _layout_tensors(layout: GridLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The layout on the device: scales [L]; int32: (offset, size, hashed) [L, 3], the coordinates' factors [L, 4]."""
    signed = [prime - 2**32 if prime >= 2**31 else prime for prime in PRIMES]
    scales, places, factors = [], [], []
    for level in layout.levels:
        scales.append(level.scale)
        places.append((level.offset, level.size, int(level.hashed)))
        powers = [min(level.resolution**d, 2**31 - 1) for d in range(4)]
        factors.append(signed if level.hashed else powers)
    return (
        torch.tensor(scales, dtype=torch.float32, device=device),
        torch.tensor(places, dtype=torch.int32, device=device),
        torch.tensor(factors, dtype=torch.int32, device=device),
    )


def hash_encode(x: Tensor, table: Tensor, layout: GridLayout, n_active: int | None = None) -> Tensor:
    """Interpolate a multiresolution hash grid linearly; see `torch_kernels.hash_encode`.

    The table is float32. The result is too, or autocast's type where that is on.
    """
    if x.shape[-1] != layout.n_dims or table.numel() != layout.n_parameters:
        raise ValueError(
            f"a grid of {layout.n_dims} dimensions and {layout.n_parameters} parameters got points of shape "
            f"{tuple(x.shape)} and {table.numel()} parameters"
        )
    _require_float32(table=table)
    n_levels = len(layout.levels) if n_active is None else max(0, min(n_active, len(layout.levels)))
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    return _HashEncode.apply(x.float(), table, layout, n_levels, dtype)


class _HashEncode(torch.autograd.Function):
    """The backward pass reads the table again instead of keeping what the forward pass read."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, layout: GridLayout, n_levels: int, dtype: torch.dtype) -> Tensor:
        from . import triton_source as source

        x, table = x.contiguous(), table.contiguous()
        ctx.save_for_backward(x, table)
        ctx.layout, ctx.n_levels = layout, n_levels
        complete = n_levels == len(layout.levels)
        out = (torch.empty if complete else torch.zeros)(x.shape[0], layout.n_outputs, dtype=dtype, device=x.device)
        if len(x) and n_levels:
            whole = layout.n_features == _power_of_two(layout.n_features)
            block, levels = 256, 4 if whole else 1  # measured; neighbouring choices are within a tenth
            grid = (-(-len(x) // block), -(-n_levels // levels))
            with _on(x.device):
                source.hash_forward[grid](
                    x, table, out, *_layout_tensors(layout, x.device), len(x), n_levels,
                    **_constants(layout), BLOCK=block, LEVELS=levels, num_warps=8,
                )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, table = ctx.saved_tensors
        layout, grad = ctx.layout, grad.contiguous()
        wants_x, wants_table = ctx.needs_input_grad[:2]
        work = bool(len(x) and ctx.n_levels)
        grad_x = _points_gradient(x, table, grad, layout, ctx.n_levels, work) if wants_x else None
        grad_table = _table_gradient(x, table, grad, layout, ctx.n_levels, work) if wants_table else None
        return grad_x, grad_table, None, None, None


def _constants(layout: GridLayout) -> dict:
    return {
        "L": len(layout.levels),
        "D": layout.n_dims,
        "F": layout.n_features,
        "FP": _power_of_two(layout.n_features),
        "FUSED": _fused(),
    }


def _table_gradient(x: Tensor, table: Tensor, grad: Tensor, layout: GridLayout, n_levels: int, work: bool) -> Tensor:
    from . import triton_source as source

    grad_table = torch.zeros_like(table)
    if work:
        runs = max(1, 128 // (2**layout.n_dims * _power_of_two(layout.n_features)))  # a number for each thread
        with _on(x.device):
            source.hash_backward_table[(-(-len(x) // (runs * _RUN)), n_levels)](
                x, grad, grad_table, *_layout_tensors(layout, x.device), len(x),
                **_constants(layout), RUNS=runs, LENGTH=_RUN, num_warps=4,
            )  # fmt: skip
    return grad_table


def _points_gradient(x: Tensor, table: Tensor, grad: Tensor, layout: GridLayout, n_levels: int, work: bool) -> Tensor:
    from . import triton_source as source

    if not work:
        return torch.zeros_like(x)
    grad_x, block = torch.empty_like(x), 128
    with _on(x.device):
        source.hash_backward_points[(-(-len(x) // block),)](
            x, table, grad, grad_x, *_layout_tensors(layout, x.device), len(x), n_levels,
            **_constants(layout), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return grad_x


def _on(device: torch.device):
    """Launch on the tensors' device, whichever is current."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


# ---- marching ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _marks(n: int, step: float, device: torch.device) -> Tensor:
    return _lattice(n, step).to(device)


@torch.no_grad()
def march_rays(
    origins: Tensor,
    directions: Tensor,
    radius: float,
    step: float,
    occupied: Tensor | None = None,
    jitter: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the intervals of rays that lie in the box and in occupied cells; see `torch_kernels.march_rays`.

    Counted first and written then, in the same order and at the same places. The host waits once, for the count.
    """
    if not len(origins):
        return origins.new_zeros(0, dtype=torch.long), origins.new_zeros(0), origins.new_zeros(0)
    walk, needed = _walk(origins, directions, radius, step, occupied, jitter)
    marks = _marks(_MARKS, step, origins.device)
    ends = walk.count(marks).cumsum(0)
    total, n_needed = torch.stack((ends[-1], needed)).tolist()
    if n_needed > len(marks):
        marks = _marks(_power_of_two(n_needed), step, origins.device)
        ends = walk.count(marks).cumsum(0)
        total = int(ends[-1])
    return walk.write(marks, ends, total, torch.empty)


@torch.no_grad()
def march_into(
    origins: Tensor,
    directions: Tensor,
    radius: float,
    step: float,
    occupied: Tensor | None,
    jitter: Tensor | None,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the intervals in lists of a length that is known beforehand; see `torch_kernels.march_into`.

    The host never waits. Where a ray is longer than the kernel's list of marks, the number of intervals is given as -1.
    """
    if not len(origins):
        return torch_kernels.march_into(origins, directions, radius, step, occupied, jitter, capacity)
    walk, needed = _walk(origins, directions, radius, step, occupied, jitter)
    marks = _marks(_MARKS, step, origins.device)
    ends = walk.count(marks).cumsum(0)
    walk.leave_out(ends > capacity)  # whole rays, so that nothing is written beyond the lists
    n_found = torch.where(needed > len(marks), -1, ends[-1])
    return *walk.write(marks, ends, capacity, torch.zeros), n_found


def _walk(
    origins: Tensor, directions: Tensor, radius: float, step: float, occupied: Tensor | None, jitter: Tensor | None
) -> tuple[_Walk, Tensor]:
    """Set out: (the walk, the number of marks it needs [] int64)."""
    _require_float32(origins=origins, directions=directions)
    first, last = _lattice_range(origins, directions, radius, step, jitter)
    met = last >= first  # does the ray meet the box?
    first = torch.where(met, first, 0).clamp_(max=2**30).int()
    last = torch.where(met, last, -1).clamp_(max=2**30).int()
    # positions are in cells, so that the kernel only rounds
    cells_per_unit = 1.0 if occupied is None else occupied.shape[0] / (2 * radius)
    start, slope = ((origins + radius) * cells_per_unit).contiguous(), (directions * cells_per_unit).contiguous()
    moved = None if jitter is None else (jitter * step).contiguous()
    cells = None if occupied is None else occupied.contiguous().view(torch.uint8)
    return _Walk(first, last, start, slope, moved, cells, step), last.max().long() + 2


class _Walk:
    """Rays on their way through the grid; the two passes over them take the same arguments."""

    def __init__(self, first: Tensor, last: Tensor, start: Tensor, slope: Tensor, moved, cells, step: float) -> None:
        self.first, self.moved, self.cells = first, moved, cells
        self.rays = (first, last, start, slope)
        self.resolution = 1 if cells is None else cells.shape[0]
        self.half_step = 0.5 * step

    def _launch(
        self, marks: Tensor, counts: Tensor, ray: Tensor, t_starts: Tensor, t_ends: Tensor, write: bool
    ) -> None:
        from . import triton_source as source

        n_rays, at_once, ahead = len(self.first), 16, 32
        with _on(self.first.device):
            source.march[(-(-n_rays // at_once),)](
                *self.rays, marks if self.moved is None else self.moved, marks,
                self.first if self.cells is None else self.cells, counts, ray, t_starts, t_ends,
                n_rays, len(marks), self.resolution, self.half_step,
                OCCUPIED=self.cells is not None, MOVED=self.moved is not None, WRITE=write, FUSED=_fused(),
                RAYS=at_once, K=ahead, num_warps=4,
            )  # fmt: skip

    def count(self, marks: Tensor) -> Tensor:
        """Intervals [N] of each ray."""
        counts = torch.empty(len(self.first), dtype=torch.long, device=marks.device)
        self._launch(marks, counts, counts, marks, marks, write=False)
        return counts

    def leave_out(self, rays: Tensor) -> None:
        """Don't write the intervals of these rays [N] (bool)."""
        first, last, start, slope = self.rays
        self.rays = (first, torch.where(rays, -1, last), start, slope)

    def write(
        self, marks: Tensor, ends: Tensor, length: int, new: Callable[..., Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The intervals in lists of this length that `new` makes, given where each ray's end in them."""
        ray = new(length, dtype=torch.long, device=marks.device)
        t_starts, t_ends = (new(length, dtype=marks.dtype, device=marks.device) for _ in range(2))
        if length:
            begins = torch.nn.functional.pad(ends[:-1], (1, 0))
            self._launch(marks, begins, ray, t_starts, t_ends, write=True)
        return ray, t_starts, t_ends


# ---- compositing ---------------------------------------------------------------------------------------------------


def ray_bounds(ray_indices: Tensor, n_rays: int) -> Tensor:
    """Where each ray's samples begin in the list, and the list's length: [N + 1] int64."""
    return torch.searchsorted(ray_indices, torch.arange(n_rays + 1, device=ray_indices.device))


def composite(
    density: Tensor, values: Tensor, ray_indices: Tensor, t_starts: Tensor, t_ends: Tensor, n_rays: int
) -> tuple[Tensor, Tensor]:
    """Weigh samples by the volume rendering integral and sum them; see `torch_kernels.composite`."""
    _require_float32(density=density, values=values, t_starts=t_starts, t_ends=t_ends)
    return _Composite.apply(density, values, t_starts, t_ends, ray_bounds(ray_indices, n_rays))


_RAYS, _AHEAD = 8, 32
"""Rays of a program, and samples of each that it looks at together."""


class _Composite(torch.autograd.Function):
    """A ray's samples lie beside each other: each program sums its own rays, nothing is shared."""

    @staticmethod
    def forward(ctx, density: Tensor, values: Tensor, t_starts: Tensor, t_ends: Tensor, bounds: Tensor):
        from . import triton_source as source

        density, values = density.contiguous(), values.contiguous()
        t_starts, t_ends = t_starts.contiguous(), t_ends.contiguous()
        n_rays, n_columns = len(bounds) - 1, values.shape[1]
        weights, clear = torch.empty_like(density), torch.empty_like(density)
        sums = values.new_empty(n_rays, n_columns)
        if n_rays:
            with _on(density.device):
                source.composite_forward[(-(-n_rays // _RAYS),)](
                    density, values, t_starts, t_ends, bounds, weights, clear, sums, n_rays,
                    K=n_columns, KP=_power_of_two(n_columns), RAYS=_RAYS, C=_AHEAD, num_warps=2,
                )  # fmt: skip
        ctx.save_for_backward(density, values, t_starts, t_ends, bounds, weights, clear)
        return weights, sums

    @staticmethod
    def backward(ctx, grad_weights: Tensor, grad_sums: Tensor):
        from . import triton_source as source

        saved = ctx.saved_tensors  # once: checkpointing computes them again for it
        density, values, *_, bounds, _weights, _clear = saved
        grad_density, grad_values = torch.empty_like(density), torch.empty_like(values)
        n_rays = len(bounds) - 1
        if n_rays and len(density):
            with _on(density.device):
                source.composite_backward[(-(-n_rays // _RAYS),)](
                    *saved, grad_weights.contiguous(), grad_sums.contiguous(), grad_density, grad_values,
                    n_rays, K=values.shape[1], RAYS=_RAYS, C=_AHEAD, num_warps=2,
                )  # fmt: skip
        return grad_density, grad_values, None, None, None


def accumulate(values: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
    """Sum values [S, K] along their rays to [n_rays, K]; see `torch_kernels.accumulate`."""
    _require_float32(values=values)
    return _Accumulate.apply(values, ray_indices, n_rays)


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
        ctx.save_for_backward(ray_indices)
        return _sum(values.contiguous(), ray_bounds(ray_indices, n_rays), n_rays)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def _sum(values: Tensor, bounds: Tensor, n_rays: int) -> Tensor:
    from . import triton_source as source

    sums = values.new_empty(n_rays, values.shape[1])
    if n_rays:
        with _on(values.device):
            source.sum_rays[(-(-n_rays // _RAYS),)](
                values, bounds, sums, n_rays, K=values.shape[1], RAYS=_RAYS, C=_AHEAD, num_warps=2
            )
    return sums
