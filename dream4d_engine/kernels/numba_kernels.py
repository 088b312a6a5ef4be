"""The kernels for CPUs, compiled on first use by numba, which brings its own compiler.

Same functions, shapes and values as `torch_kernels`, which takes what isn't float32. Work is divided among as many
threads as PyTorch uses, each level of a table's gradient being one thread's alone: nothing depends on their number.
The threads are ours, not numba's: those bear no second caller at the same time, and take longer to compile for.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import torch_kernels
from .launched import first_line
from .layout import PRIMES, GridLayout, grid_layout
from .torch_kernels import _lattice, _lattice_range

_SAMPLES, _RAYS = 2048, 256
"""The fewest of them that are worth a thread of their own."""


def check(device: torch.device) -> None:
    """Raise ImportError or RuntimeError, with the reason, where these kernels cannot run."""
    if device.type != "cpu":
        raise RuntimeError("they are for CPUs")
    missing, fault = _fault()
    if missing:
        raise ModuleNotFoundError(fault, name=missing)
    if fault:
        raise RuntimeError(fault)


@lru_cache(maxsize=1)
def _fault() -> tuple[str, str]:
    """The module that is missing, and why no function can be compiled; empty where all is well. Once a process.

    In words: an error that is kept keeps all that the functions it went through hold, models and all.
    """
    logging.getLogger("numba").setLevel(logging.WARNING)  # at DEBUG it tells all that its compiler thinks
    try:
        # under ComfyUI, inference mode is on
        with torch.inference_mode(False), torch.enable_grad():
            found = _trial()
    except ModuleNotFoundError as error:
        return error.name or "numba", str(error)
    except Exception as error:  # whatever a compiler may raise, or a numba that doesn't know this numpy
        return "", f"a first kernel failed: {type(error).__name__}: {first_line(error)}"
    return "", "" if found == (8, 8, 0) else f"a first kernel gave {found} instead of (8, 8, 0)"


def _trial() -> tuple[float, ...]:
    """Run all the loops on two rays of two samples: what can't be compiled, kept or read fails here, before a run."""
    layout = grid_layout(3, 1, 2, 6, 2, 1.5)
    x, table = torch.full((4, 3), 0.5, requires_grad=True), torch.ones(layout.n_parameters, requires_grad=True)
    directions, occupied = torch.eye(3)[:2], torch.ones(2, 2, 2, dtype=torch.bool)
    ray, t_starts, t_ends = march_rays(torch.zeros(2, 3), directions, 1.0, 0.5, occupied)
    features = hash_encode(x, table, layout)
    weights, _ = composite(torch.zeros(4), features, ray, t_starts, t_ends, 2)
    sums = accumulate(features, ray, 2).sum()
    grad_table, grad_x = torch.autograd.grad(sums + weights.sum(), (table, x))
    return float(sums.detach()), float(grad_table.sum()), float(grad_x.sum())


# ---- threads -------------------------------------------------------------------------------------------------------


def _share_out(work: Callable[[int, int], None], n: int, least: int) -> None:
    """Call work(begin, end) for parts of range(n), on threads where there are at least so many for each."""
    n_parts = max(1, min(torch.get_num_threads(), n // least))
    edges = [n * part // n_parts for part in range(n_parts + 1)]
    first, *others = itertools.pairwise(edges)
    at_work = [_threads(os.getpid()).submit(work, *ends) for ends in others]
    work(*first)
    for other in at_work:
        other.result()


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """The threads of a process; one that was forked has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="dream4d")


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


# ---- hash encoding -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _layout_numbers(layout: GridLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """What the loops are told of a layout, see `numba_source.encode`."""
    levels = layout.levels
    scales = np.array([level.scale for level in levels], np.float64)
    places = np.array([(level.offset, level.size, level.hashed) for level in levels], np.int64)
    factors = [PRIMES if level.hashed else [level.resolution**d for d in range(len(PRIMES))] for level in levels]
    return scales, places, (np.array(factors, np.int64) % 2**32).astype(np.uint32), layout.n_features


def hash_encode(x: Tensor, table: Tensor, layout: GridLayout, n_active: int | None = None) -> Tensor:
    """Interpolate a multiresolution hash grid linearly; see `torch_kernels.hash_encode`."""
    if table.dtype != torch.float32 or x.shape[-1] != layout.n_dims or table.numel() != layout.n_parameters:
        return torch_kernels.hash_encode(x, table, layout, n_active)  # or it says what is wrong
    n_levels = len(layout.levels) if n_active is None else max(0, min(n_active, len(layout.levels)))
    return _HashEncode.apply(x.float(), table, layout, n_levels)


class _HashEncode(torch.autograd.Function):
    """The backward pass finds the corners again instead of keeping them."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, layout: GridLayout, n_levels: int) -> Tensor:
        from . import numba_source as source

        ctx.save_for_backward(x, table)
        ctx.layout, ctx.n_levels = layout, n_levels
        complete = n_levels == len(layout.levels)
        out = (torch.empty if complete else torch.zeros)(x.shape[0], layout.n_outputs)
        given = _numbers(x), _numbers(table), out.numpy(), _layout_numbers(layout), n_levels
        _share_out(lambda begin, end: source.encode(*given, begin, end), len(x), _SAMPLES)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        from . import numba_source as source

        x, table = ctx.saved_tensors
        wants_x, wants_table = ctx.needs_input_grad[:2]
        points, pull, layout = _numbers(x), _numbers(grad), _layout_numbers(ctx.layout)
        grad_x = grad_table = None
        if wants_table:
            grad_table = torch.zeros_like(table)
            given = points, pull, grad_table.numpy(), layout
            least = max(1, -(-_SAMPLES * ctx.n_levels // max(len(x), 1)))  # levels that are as much work
            _share_out(lambda begin, end: source.encode_table_gradient(*given, begin, end), ctx.n_levels, least)
        if wants_x:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            told = points, _numbers(table), pull, grad_x.numpy(), layout, ctx.n_levels
            _share_out(lambda begin, end: source.encode_points_gradient(*told, begin, end), len(x), _SAMPLES)
        return grad_x, grad_table, None, None


# ---- marching ------------------------------------------------------------------------------------------------------


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

    Counted first and written then, in the same order and at the same places.
    """
    if origins.dtype != torch.float32 or not len(origins):
        return torch_kernels.march_rays(origins, directions, radius, step, occupied, jitter)
    from . import numba_source as source

    n_rays = len(origins)
    first, last = (_numbers(k.long()) for k in _lattice_range(origins, directions, radius, step, jitter))
    # positions are in cells, so that the loop only rounds
    cells_per_unit = 1.0 if occupied is None else occupied.shape[0] / (2 * radius)
    start, slope = (origins + radius) * cells_per_unit, directions * cells_per_unit
    moved = origins.new_zeros(n_rays) if jitter is None else jitter * step
    cells = torch.zeros(0, 0, 0, dtype=torch.bool) if occupied is None else occupied
    rays = first, last, _numbers(start), _numbers(slope), _numbers(moved)
    given = rays, _lattice(max(int(last.max()), 0) + 2, step).numpy(), _numbers(cells), np.float32(0.5 * step)

    def walk(found: np.ndarray, columns: Sequence[Tensor]) -> None:
        lists = tuple(column.numpy() for column in columns)
        _share_out(lambda begin, end: source.march(*given, found, lists, begin, end), n_rays, _RAYS)

    counts = np.empty(n_rays, np.int64)
    walk(counts, (torch.empty(0, dtype=torch.long), torch.empty(0), torch.empty(0)))
    ends = counts.cumsum()
    total = int(ends[-1])
    columns = torch.empty(total, dtype=torch.long), torch.empty(total), torch.empty(total)
    if total:
        walk(ends - counts, columns)
    return columns


# ---- compositing ---------------------------------------------------------------------------------------------------


def _ray_bounds(ray_indices: Tensor, n_rays: int) -> np.ndarray:
    """Where each ray's samples begin in the list, and the list's length: [N + 1]."""
    from . import numba_source as source

    bounds = np.empty(n_rays + 1, np.int64)
    source.find_rays(_numbers(ray_indices), bounds)
    return bounds


def composite(
    density: Tensor, values: Tensor, ray_indices: Tensor, t_starts: Tensor, t_ends: Tensor, n_rays: int
) -> tuple[Tensor, Tensor]:
    """Weigh samples by the volume rendering integral and sum them; see `torch_kernels.composite`."""
    if any(given.dtype != torch.float32 for given in (density, values, t_starts, t_ends)):
        return torch_kernels.composite(density, values, ray_indices, t_starts, t_ends, n_rays)
    return _Composite.apply(density, values, t_starts, t_ends, _ray_bounds(ray_indices, n_rays))


class _Composite(torch.autograd.Function):
    """A ray's samples lie beside each other: each thread sums its own rays, nothing is shared."""

    @staticmethod
    def forward(ctx, density: Tensor, values: Tensor, t_starts: Tensor, t_ends: Tensor, bounds: np.ndarray):
        from . import numba_source as source

        n_rays = len(bounds) - 1
        weights, clear = torch.empty(len(density)), torch.empty(len(density))
        sums = torch.zeros(n_rays, values.shape[1])
        columns = (_numbers(column) for column in (density, values, t_starts, t_ends))
        given = *columns, bounds, weights.numpy(), clear.numpy(), sums.numpy()
        _share_out(lambda begin, end: source.composite(*given, begin, end), n_rays, _RAYS)
        ctx.save_for_backward(values, t_starts, t_ends, weights, clear)
        ctx.bounds = bounds
        return weights, sums

    @staticmethod
    def backward(ctx, grad_weights: Tensor, grad_sums: Tensor):
        from . import numba_source as source

        values, t_starts, t_ends, weights, clear = ctx.saved_tensors
        grad_density, grad_values = torch.empty_like(weights), torch.empty(values.shape)
        lengths, found = t_ends - t_starts, (grad_density.numpy(), grad_values.numpy())
        columns = (_numbers(column) for column in (weights, clear, grad_weights, grad_sums))
        given = _numbers(values), _numbers(lengths), ctx.bounds, *columns, *found
        _share_out(lambda begin, end: source.composite_gradient(*given, begin, end), len(ctx.bounds) - 1, _RAYS)
        return grad_density, grad_values, None, None, None


def accumulate(values: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
    """Sum values [S, K] along their rays to [n_rays, K]; see `torch_kernels.accumulate`."""
    if values.dtype != torch.float32:
        return torch_kernels.accumulate(values, ray_indices, n_rays)
    return _Accumulate.apply(values, ray_indices, n_rays)


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
        from . import numba_source as source

        ctx.save_for_backward(ray_indices)
        sums = torch.zeros(n_rays, values.shape[1])
        given = _numbers(values), _ray_bounds(ray_indices, n_rays), sums.numpy()
        _share_out(lambda begin, end: source.sum_rays(*given, begin, end), n_rays, _RAYS)
        return sums

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
