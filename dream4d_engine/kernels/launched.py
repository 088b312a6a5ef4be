"""What backends that launch kernels on a GPU have in common: everything but the launches.

Same functions, shapes and values as `torch_kernels`, after the launches of a backend. Sums over samples are made with
atomic additions in the table's gradient only, so everything else is repeatable. Under autocast the encoding is
returned in half precision, as the networks behind it take it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from . import torch_kernels
from .layout import PRIMES, GridLayout
from .torch_kernels import _lattice, _lattice_range

_MARKS = 4096
"""Lattice points that rays usually stay within; more are made where a camera is farther away."""


@dataclass(frozen=True)
class Launches:
    """The launches of a backend. They take contiguous tensors and write into some of them; sizes are never 0."""

    name: str
    encode: Callable[[Tensor, Tensor, Tensor, GridLayout, int], None]  # x, table, to out
    encode_to_table: Callable[[Tensor, Tensor, Tensor, GridLayout, int], None]  # x, grad, to grad_table: added
    encode_to_points: Callable[[Tensor, Tensor, Tensor, Tensor, GridLayout, int], None]  # x, table, grad, to grad_x
    march: Callable[[Walk, Tensor, Tensor, Tensor, Tensor, Tensor, bool], None]  # see `Walk.launch`
    composite: Callable[..., None]  # density, values, t_starts, t_ends, bounds, to weights, to clear, to sums
    composite_back: Callable[..., None]  # the first seven, their gradients of weights and sums, to density's, values'
    sum_rays: Callable[[Tensor, Tensor, Tensor], None]  # values, bounds, to sums


def functions(launches: Launches) -> tuple[Callable, Callable, Callable, Callable, Callable]:
    """hash_encode, march_rays, march_into, composite and accumulate by these launches."""
    return (
        partial(hash_encode, launches),
        partial(march_rays, launches),
        partial(march_into, launches),
        partial(composite, launches),
        partial(accumulate, launches),
    )


def try_out(launches: Launches, device: torch.device) -> None:
    """Raise RuntimeError, with the reason, where a first small kernel does not give what it should."""
    try:
        values, sums = torch.ones(4, 1, device=device), torch.zeros(1, 1, device=device)
        launches.sum_rays(values, torch.tensor([0, 4], device=device), sums)
        total = float(sums)
    except Exception as error:  # whatever a compiler may raise
        raise RuntimeError(f"a first kernel failed: {type(error).__name__}: {first_line(error)}") from error
    if total != 4:
        raise RuntimeError(f"a first kernel gave {total} instead of 4")


def first_line(error: Exception) -> str:
    """The first line of what a compiler said."""
    return (str(error).strip() or "no message").splitlines()[0][:300]


def on_device(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device: in here that is the tensors', whichever it was."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def unobserved() -> torch.autograd.graph.saved_tensors_hooks:
    """A first look at a kernel, in here, keeps tensors that activation checkpointing around it doesn't count."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def power_of_two(n: int) -> int:
    """The first power of two from n on."""
    return 1 << (n - 1).bit_length()


def _require_float32(launches: Launches, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"the {launches.name} kernels take {name} in float32, got {tensor.dtype}")


# ---- hash encoding -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def layout_tensors(layout: GridLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
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


def hash_encode(
    launches: Launches, x: Tensor, table: Tensor, layout: GridLayout, n_active: int | None = None
) -> Tensor:
    """Interpolate a multiresolution hash grid linearly; see `torch_kernels.hash_encode`.

    The table is float32. The result is too, or autocast's type where that is on.
    """
    if x.shape[-1] != layout.n_dims or table.numel() != layout.n_parameters:
        raise ValueError(
            f"a grid of {layout.n_dims} dimensions and {layout.n_parameters} parameters got points of shape "
            f"{tuple(x.shape)} and {table.numel()} parameters"
        )
    _require_float32(launches, table=table)
    n_levels = len(layout.levels) if n_active is None else max(0, min(n_active, len(layout.levels)))
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    return _HashEncode.apply(x.float(), table, layout, n_levels, dtype, launches)


class _HashEncode(torch.autograd.Function):
    """The backward pass reads the table again instead of keeping what the forward pass read."""

    @staticmethod
    def forward(
        ctx, x: Tensor, table: Tensor, layout: GridLayout, n_levels: int, dtype: torch.dtype, launches: Launches
    ) -> Tensor:
        x, table = x.contiguous(), table.contiguous()
        ctx.save_for_backward(x, table)
        ctx.layout, ctx.n_levels, ctx.launches = layout, n_levels, launches
        complete = n_levels == len(layout.levels)
        out = (torch.empty if complete else torch.zeros)(x.shape[0], layout.n_outputs, dtype=dtype, device=x.device)
        if len(x) and n_levels:
            launches.encode(x, table, out, layout, n_levels)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, table = ctx.saved_tensors
        grad, known = grad.contiguous(), (ctx.layout, ctx.n_levels)
        wants_x, wants_table = ctx.needs_input_grad[:2]
        work = bool(len(x) and ctx.n_levels)
        grad_x = grad_table = None
        if wants_x:
            grad_x = (torch.empty_like if work else torch.zeros_like)(x)
            if work:
                ctx.launches.encode_to_points(x, table, grad, grad_x, *known)
        if wants_table:
            grad_table = torch.zeros_like(table)
            if work:
                ctx.launches.encode_to_table(x, grad, grad_table, *known)
        return grad_x, grad_table, None, None, None, None


# ---- marching ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _marks(n: int, step: float, device: torch.device) -> Tensor:
    return _lattice(n, step).to(device)


@torch.no_grad()
def march_rays(
    launches: Launches,
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
    _require_float32(launches, origins=origins, directions=directions)
    walk, needed = _walk(origins, directions, radius, step, occupied, jitter)
    marks = _marks(_MARKS, step, origins.device)
    ends = walk.count(launches, marks).cumsum(0)
    total, n_needed = torch.stack((ends[-1], needed)).tolist()
    if n_needed > len(marks):
        marks = _marks(power_of_two(n_needed), step, origins.device)
        ends = walk.count(launches, marks).cumsum(0)
        total = int(ends[-1])
    return walk.write(launches, marks, ends, total, torch.empty)


@torch.no_grad()
def march_into(
    launches: Launches,
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
    _require_float32(launches, origins=origins, directions=directions)
    walk, needed = _walk(origins, directions, radius, step, occupied, jitter)
    marks = _marks(_MARKS, step, origins.device)
    ends = walk.count(launches, marks).cumsum(0)
    walk = walk.without(ends > capacity)  # whole rays, so that nothing is written beyond the lists
    n_found = torch.where(needed > len(marks), -1, ends[-1])
    return *walk.write(launches, marks, ends, capacity, torch.zeros), n_found


def _walk(
    origins: Tensor, directions: Tensor, radius: float, step: float, occupied: Tensor | None, jitter: Tensor | None
) -> tuple[Walk, Tensor]:
    """Set out: (the walk, the number of marks it needs [] int64)."""
    first, last = _lattice_range(origins, directions, radius, step, jitter)
    met = last >= first  # does the ray meet the box?
    first = torch.where(met, first, 0).clamp_(max=2**30).int()
    last = torch.where(met, last, -1).clamp_(max=2**30).int()
    # positions are in cells, so that the kernel only rounds
    cells_per_unit = 1.0 if occupied is None else occupied.shape[0] / (2 * radius)
    start, slope = ((origins + radius) * cells_per_unit).contiguous(), (directions * cells_per_unit).contiguous()
    moved = None if jitter is None else (jitter * step).float().contiguous()
    cells = None if occupied is None else occupied.contiguous().view(torch.uint8)
    return Walk(first, last, start, slope, moved, cells, 0.5 * step), last.max().long() + 2


@dataclass(frozen=True)
class Walk:
    """Rays on their way through the grid; the two passes over them take the same arguments."""

    first: Tensor  # [N] int32, the lattice points between which a ray is in the box
    last: Tensor
    start: Tensor  # [N, 3], in cells
    slope: Tensor
    moved: Tensor | None  # [N]
    cells: Tensor | None  # [R, R, R] uint8
    half_step: float

    @property
    def resolution(self) -> int:
        """Cells a side."""
        return 1 if self.cells is None else self.cells.shape[0]

    def count(self, launches: Launches, marks: Tensor) -> Tensor:
        """Intervals [N] of each ray."""
        counts = torch.empty(len(self.first), dtype=torch.long, device=marks.device)
        launches.march(self, marks, counts, counts, marks, marks, False)
        return counts

    def without(self, rays: Tensor) -> Walk:
        """The walk that finds no intervals of these rays [N] (bool)."""
        return replace(self, last=torch.where(rays, -1, self.last))

    def write(
        self, launches: Launches, marks: Tensor, ends: Tensor, length: int, new: Callable[..., Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The intervals in lists of this length that `new` makes, given where each ray's end in them."""
        ray = new(length, dtype=torch.long, device=marks.device)
        t_starts, t_ends = (new(length, dtype=marks.dtype, device=marks.device) for _ in range(2))
        if length:
            begins = torch.nn.functional.pad(ends[:-1], (1, 0))
            launches.march(self, marks, begins, ray, t_starts, t_ends, True)
        return ray, t_starts, t_ends


# ---- compositing ---------------------------------------------------------------------------------------------------


def ray_bounds(ray_indices: Tensor, n_rays: int) -> Tensor:
    """Where each ray's samples begin in the list, and the list's length: [N + 1] int64."""
    return torch.searchsorted(ray_indices, torch.arange(n_rays + 1, device=ray_indices.device))


def composite(
    launches: Launches,
    density: Tensor,
    values: Tensor,
    ray_indices: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    n_rays: int,
) -> tuple[Tensor, Tensor]:
    """Weigh samples by the volume rendering integral and sum them; see `torch_kernels.composite`."""
    _require_float32(launches, density=density, values=values, t_starts=t_starts, t_ends=t_ends)
    return _Composite.apply(density, values, t_starts, t_ends, ray_bounds(ray_indices, n_rays), launches)


class _Composite(torch.autograd.Function):
    """A ray's samples lie beside each other: each program sums its own rays, nothing is shared."""

    @staticmethod
    def forward(
        ctx, density: Tensor, values: Tensor, t_starts: Tensor, t_ends: Tensor, bounds: Tensor, launches: Launches
    ):
        density, values = density.contiguous(), values.contiguous()
        t_starts, t_ends = t_starts.contiguous(), t_ends.contiguous()
        n_rays, n_columns = len(bounds) - 1, values.shape[1]
        weights, clear = torch.empty_like(density), torch.empty_like(density)
        sums = values.new_empty(n_rays, n_columns)
        if n_rays:
            launches.composite(density, values, t_starts, t_ends, bounds, weights, clear, sums)
        ctx.save_for_backward(density, values, t_starts, t_ends, bounds, weights, clear)
        ctx.launches = launches
        return weights, sums

    @staticmethod
    def backward(ctx, grad_weights: Tensor, grad_sums: Tensor):
        saved = ctx.saved_tensors  # once: checkpointing computes them again for it
        density, values, *_, bounds, _weights, _clear = saved
        grad_density, grad_values = torch.empty_like(density), torch.empty_like(values)
        if len(bounds) > 1 and len(density):
            ctx.launches.composite_back(
                *saved, grad_weights.contiguous(), grad_sums.contiguous(), grad_density, grad_values
            )
        return grad_density, grad_values, None, None, None, None


def accumulate(launches: Launches, values: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
    """Sum values [S, K] along their rays to [n_rays, K]; see `torch_kernels.accumulate`."""
    _require_float32(launches, values=values)
    return _Accumulate.apply(values, ray_indices, n_rays, launches)


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, ray_indices: Tensor, n_rays: int, launches: Launches) -> Tensor:
        ctx.save_for_backward(ray_indices)
        sums = values.new_empty(n_rays, values.shape[1])
        if n_rays:
            launches.sum_rays(values.contiguous(), ray_bounds(ray_indices, n_rays), sums)
        return sums

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None, None
