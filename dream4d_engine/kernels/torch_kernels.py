"""The kernels in plain PyTorch: the reference that every other backend is tested against.

Letters: S samples, N rays, D dimensions, C = 2^D corners of a grid cell, F features, L levels.
Everything is deterministic on CPU for a fixed number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import PRIMES, GridLayout, GridLevel

_CHUNK = 2**14
"""Samples handled at once on CPU: the work arrays then stay in the second-level cache (measured)."""
_ROWS = 2**12
"""Samples that a network is asked for together on CPU where no gradient is kept, likewise: a third of the time."""
_SIGNED_PRIMES = tuple(prime - 2**32 if prime >= 2**31 else prime for prime in PRIMES)
"""The hash's factors as int32."""
_MAX_CANDIDATES = 2**22
"""Lattice points looked at together while marching; bounds the memory."""


def hash_encode(x: Tensor, table: Tensor, layout: GridLayout, n_active: int | None = None) -> Tensor:
    """Interpolate a multiresolution hash grid linearly.

    Args:
        x: [S, D] points in [0, 1]^D. table: [layout.n_parameters]. n_active: levels from here on give zeros.
    Returns:
        [S, L * F] in the table's dtype. Differentiable once in `x` and `table`.
    """
    if x.shape[-1] != layout.n_dims or table.numel() != layout.n_parameters:
        raise ValueError(
            f"a grid of {layout.n_dims} dimensions and {layout.n_parameters} parameters got points of shape "
            f"{tuple(x.shape)} and {table.numel()} parameters"
        )
    n_levels = len(layout.levels) if n_active is None else max(0, min(n_active, len(layout.levels)))
    return _HashEncode.apply(x.to(table.dtype), table, layout, n_levels)


class _HashEncode(torch.autograd.Function):
    """Corners are gathered and scattered level by level; the backward pass computes them again (saves memory)."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, layout: GridLayout, n_levels: int) -> Tensor:
        ctx.save_for_backward(x, table)
        ctx.layout, ctx.n_levels = layout, n_levels
        n_features, chunks = layout.n_features, _chunks(x, layout.n_features)
        out = table.new_zeros(len(layout.levels), x.shape[0] * n_features)
        for row, level in zip(out, layout.levels[:n_levels], strict=False):
            entries = _wrapped_entries(table, level, layout)
            for columns, points in chunks:
                index, share = _corners(points, level, n_features, table.dtype)
                row[columns] = _interpolate(_gather(entries, index), share)
        return _swap(out.view(len(layout.levels), x.shape[0], n_features)).view(x.shape[0], layout.n_outputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, table = ctx.saved_tensors
        layout, n_features = ctx.layout, ctx.layout.n_features
        wants_x, wants_table = ctx.needs_input_grad[:2]
        grad = _swap(grad.contiguous().view(x.shape[0], len(layout.levels), n_features)).flatten(1)
        grad_x = x.new_zeros(x.shape[1], x.shape[0] * n_features) if wants_x else None
        grad_table = torch.zeros_like(table) if wants_table else None
        chunks = _chunks(x, n_features)
        for row, level in zip(grad, layout.levels[: ctx.n_levels], strict=False):
            entries = _wrapped_entries(table, level, layout)
            grad_entries = torch.zeros_like(entries)
            for columns, points in chunks:
                index, share = _corners(points, level, n_features, table.dtype)
                if grad_table is not None:
                    _scatter_add(grad_entries, index, _spread(row[columns], share))
                if grad_x is not None:
                    values = _gather(entries, index) * row[columns]
                    for d, slope in enumerate(_slopes(values, share)):
                        grad_x[d, columns].add_(slope, alpha=level.scale)  # share = u * scale + 0.5 - its integer part
            if grad_table is not None:
                _unwrap_entries(grad_entries, grad_table, level, n_features)
        if grad_x is not None:
            grad_x = grad_x.view(x.shape[1], x.shape[0], n_features).sum(-1).t()  # [S, D]
        return grad_x, grad_table, None, None


def _chunks(x: Tensor, n_features: int) -> list[tuple[slice, Tensor]]:
    """Split the points x [S, D] into parts [D, s * F], each coordinate F times, so that all later work runs along one
    contiguous axis M = s * F; with the columns of each part. On CPU they are float64, see `_position`."""
    on_cpu = x.device.type == "cpu"
    size = _CHUNK if on_cpu else max(len(x), 1)
    parts = []
    for start in range(0, len(x), size):
        part = x[start : start + size]
        part = part.double() if on_cpu else part
        repeated = part.t()[..., None].expand(-1, -1, n_features).reshape(x.shape[1], -1)
        columns = slice(start * n_features, start * n_features + repeated.shape[1])
        parts.append((columns, repeated))
    return parts


def _wrapped_entries(table: Tensor, level: GridLevel, layout: GridLayout) -> Tensor:
    """Return the entries of a level [T, F], a dense one's first ones again after the last."""
    entries = table.detach().view(-1, layout.n_features)[level.offset : level.offset + level.size]
    if level.hashed:
        return entries
    # at u = 1 the upper corners of a dense level lie one beyond the last row: their numbers carry into the next row,
    # and beyond the last entry they start over
    beyond = sum(level.resolution ** (d + 1) for d in range(layout.n_dims)) + 1 - level.size
    return torch.cat((entries, entries[: max(beyond, 0)]))


def _unwrap_entries(grad_entries: Tensor, grad_table: Tensor, level: GridLevel, n_features: int) -> None:
    """The transpose of `_wrapped_entries`, into the level's part of `grad_table`."""
    part = grad_table.view(-1, n_features)[level.offset : level.offset + level.size]
    part.copy_(grad_entries[: level.size])
    part[: len(grad_entries) - level.size] += grad_entries[level.size :]


def _swap(values: Tensor) -> Tensor:
    """[A, B, F] -> [B, A, F], contiguous."""
    if values.shape[-1] == 2 and values.device.type == "cpu":  # one complex number each: copied in blocks
        return torch.view_as_real(torch.view_as_complex(values).t().contiguous())
    return values.transpose(0, 1).contiguous()


def _position(x: Tensor, scale: float) -> Tensor:
    """Return x * scale + 0.5 rounded once, as a GPU does it (fused): rounding twice shows at the finest levels."""
    if x.device.type == "cpu":
        return (x * scale).add_(0.5)  # x is float64 here
    return torch.addcmul(x.new_tensor(0.5), x, x.new_tensor(scale))


def _corners(x: Tensor, level: GridLevel, n_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the entry numbers [C, s] of a cell's corners (the first coordinate is the slowest bit of c) and the
    shares [D, M] in [0, 1) of the upper corners."""
    position = _position(x, level.scale).to(dtype)
    low = position.view(x.shape[0], -1, n_features)[..., 0].int()
    return _entry_numbers(low, level), position.frac_()


def _entry_numbers(low: Tensor, level: GridLevel) -> Tensor:
    """low [D, s] -> [C, s], both int32."""
    n_dims, n_points = low.shape
    combine = torch.bitwise_xor if level.hashed else torch.add
    index = low.new_zeros(1, n_points)
    for d in reversed(range(n_dims)):
        factor = _SIGNED_PRIMES[d] if level.hashed else level.resolution**d
        first = low[d] * factor  # what overflows keeps its low 32 bits, which is all the hash needs
        grown = index.new_empty(2, index.shape[0], n_points)
        combine(index, first, out=grown[0])
        combine(index, first + factor, out=grown[1])
        index = grown.view(-1, n_points)
    return index.bitwise_and_(level.size - 1) if level.hashed else index  # the size is a power of two


def _interpolate(values: Tensor, share: Tensor) -> Tensor:
    """Reduce [2^k, M] to [M] by k linear interpolations, shares [k, M]."""
    for s in share:
        low, high = values.view(2, -1, values.shape[-1])  # the first coordinate is the slowest bit
        values = torch.lerp(low, high, s)
    return values[0]


def _spread(grad: Tensor, share: Tensor) -> Tensor:
    """The transpose of `_interpolate`: [M] -> [2^k, M]."""
    values = grad[None]
    for s in reversed(share.unbind()):
        grown = values.new_empty(2, *values.shape)
        torch.mul(values, s, out=grown[1])
        torch.sub(values, grown[1], out=grown[0])
        values = grown.view(-1, grad.shape[0])
    return values


def _slopes(values: Tensor, share: Tensor) -> Iterator[Tensor]:
    """Yield the derivatives [M] of the interpolated `values` [C, M] with respect to each of the shares [D, M]."""
    for d in range(len(share)):
        low, high = values.view(2, -1, values.shape[-1])
        yield _interpolate(high - low, share[d + 1 :])
        values = torch.lerp(low, high, share[d])


def _as_pairs(table: Tensor) -> Tensor | None:
    """See rows of two numbers as one complex number each: gathering and scattering one-dimensional tensors is four
    times as fast on CPU as rows of two."""
    if table.shape[-1] == 2 and table.device.type == "cpu":
        return torch.view_as_complex(table)
    return None


def _gather(table: Tensor, index: Tensor) -> Tensor:
    """table [T, F], index [C, S] -> [C, S * F]."""
    pairs = _as_pairs(table)
    if pairs is None:
        return table.index_select(0, index.view(-1)).view(index.shape[0], -1)
    return torch.view_as_real(pairs.index_select(0, index.view(-1))).view(index.shape[0], -1)


def _scatter_add(table: Tensor, index: Tensor, values: Tensor) -> None:
    """Add values [C, S * F] to the rows index [C, S] of table [T, F], in place."""
    values = values.view(-1, table.shape[-1])
    pairs = _as_pairs(table)
    if pairs is None:
        table.index_add_(0, index.view(-1), values)
    else:
        pairs.scatter_add_(0, index.view(-1).long(), torch.view_as_complex(values))


def march_rays(
    origins: Tensor,
    directions: Tensor,
    radius: float,
    step: float,
    occupied: Tensor | None = None,
    jitter: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the intervals of rays that lie in the box [-radius, radius]^3 and in occupied cells.

    Intervals begin at (k + jitter) * step from the ray's origin, k = 0, 1, ...; an interval counts if its middle is
    in the box and in an occupied cell.

    Args:
        origins, directions: [N, 3], directions of unit length. occupied: [R, R, R] bool, axes x, y, z, or None.
        jitter: [N] in [0, 1), or None for 0.
    Returns:
        ray_indices [S] int64, ascending; t_starts, t_ends [S]. No gradient.
    """
    with torch.no_grad():
        first, last = _lattice_range(origins, directions, radius, step, jitter)
        longest = int((last - first).max().clamp_min(0)) + 1 if len(origins) else 1
        marks = _lattice(int(last.max().clamp_min(0)) + 2 if len(origins) else 1, step).to(origins)
        rays_at_once = max(1, _MAX_CANDIDATES // longest)
        parts = []
        for start in range(0, len(origins), rays_at_once):
            rows = slice(start, start + rays_at_once)
            lowest, highest = first[rows].long(), last[rows].long()
            n_candidates = int((highest - lowest).max().clamp_min(-1)) + 1
            k = lowest[:, None] + torch.arange(n_candidates, device=origins.device)  # [n, n_candidates]
            keep = k <= highest[:, None]
            if occupied is not None:
                middle = marks[k.clamp_max(len(marks) - 1)] + 0.5 * step
                if jitter is not None:
                    middle = middle + jitter[rows, None] * step
                keep &= _is_occupied(origins[rows], directions[rows], middle, radius, occupied)
            ray, column = keep.nonzero(as_tuple=True)
            parts.append((ray + start, k[ray, column]))
        if not parts:
            return origins.new_zeros(0, dtype=torch.long), origins.new_zeros(0), origins.new_zeros(0)
        rays, k = (torch.cat(column) for column in zip(*parts, strict=True))
        moved = 0.0 if jitter is None else jitter[rays] * step
        return rays, marks[k] + moved, marks[k + 1] + moved


def march_into(
    origins: Tensor,
    directions: Tensor,
    radius: float,
    step: float,
    occupied: Tensor | None,
    jitter: Tensor | None,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the intervals of `march_rays` in lists of a length that is known beforehand.

    Returns:
        ray_indices, t_starts, t_ends [capacity], and how many intervals there are [] int64, on the device. Where that
        is less than `capacity`, what follows them is of length 0; where it is more, the lists hold some of them. -1
        where a backend can't say.
    """
    columns = march_rays(origins, directions, radius, step, occupied, jitter)
    n_found = len(columns[0])
    ray, t_starts, t_ends = (F.pad(column[:capacity], (0, max(0, capacity - n_found))) for column in columns)
    return ray, t_starts, t_ends, torch.tensor(n_found, device=origins.device)


def _lattice(n: int, step: float) -> Tensor:
    """Return the first n multiples of the step as fp32 has them when a ray is walked step by step."""
    # After hundreds of additions they differ from true multiples in the fifth digit. The published renderer walks like
    # that, and images of fine grids agree with its own only if the samples lie in the same places.
    steps = np.full(n, step, dtype=np.float32)
    steps[0] = 0
    return torch.from_numpy(np.add.accumulate(steps, dtype=np.float32))


def _lattice_range(origins, directions, radius: float, step: float, jitter) -> tuple[Tensor, Tensor]:
    """Return the first and last k [N] (float) whose interval's middle can be in the box; last < first where none."""
    # slabs: where a ray crosses the box's two planes of each axis; parallel ones cross them far away
    safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    a, b = (-radius - origins) / safe, (radius - origins) / safe
    near = torch.minimum(a, b).amax(-1).clamp_min(0.0)  # nothing behind the camera
    far = torch.maximum(a, b).amin(-1)
    middle = 0.5 if jitter is None else 0.5 + jitter
    return (near / step - middle).ceil().clamp_min(0), (far / step - middle).floor()


def _is_occupied(origins: Tensor, directions: Tensor, t: Tensor, radius: float, occupied: Tensor) -> Tensor:
    """Whether the places at the distances t [N, K] on the rays [N, 3] lie in occupied cells: [N, K] bool."""
    resolution = occupied.shape[0]
    cells_per_unit = resolution / (2 * radius)
    start, slope = (origins + radius) * cells_per_unit, directions * cells_per_unit  # positions in cells
    cell = torch.zeros(t.shape, dtype=torch.long, device=t.device)
    for d in range(3):
        along = torch.addcmul(start[:, d, None], t, slope[:, d, None])  # rounded once, as other backends do it
        cell = cell * resolution + along.long().clamp_(0, resolution - 1)  # the last coordinate runs fastest
    return occupied.reshape(-1)[cell]


def composite(
    density: Tensor, values: Tensor, ray_indices: Tensor, t_starts: Tensor, t_ends: Tensor, n_rays: int
) -> tuple[Tensor, Tensor]:
    """Weigh samples by the volume rendering integral and sum them along their rays.

    w_i = (1 - exp(-density_i dt_i)) * exp(-sum of density_j dt_j over the ray's earlier samples).

    Args:
        density: [S] >= 0. values: [S, K]. ray_indices: [S], ascending. t_starts, t_ends: [S].
    Returns:
        weights [S] and sums [n_rays, K], sum over a ray of w_i values_i; differentiable in density and values.
    """
    thickness = density * (t_ends - t_starts)
    # alpha_i T_i: NeRF 2003.08934, equation 3
    weights = -torch.expm1(-thickness) * torch.exp(-_sum_before(thickness, ray_indices, n_rays))
    return weights, accumulate(weights[:, None] * values, ray_indices, n_rays)


def accumulate(values: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
    """Sum values [S, K] along their rays, ray_indices [S] ascending: [n_rays, K]; differentiable in values."""
    return values.new_zeros(n_rays, values.shape[-1]).index_add(0, ray_indices, values)


def _sum_before(values: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
    """Return for each sample the sum of its ray's earlier `values` [S]."""
    if values.numel() == 0:
        return values
    begins = torch.searchsorted(ray_indices, torch.arange(n_rays + 1, device=values.device))  # [N + 1]
    starts = begins[ray_indices]
    if values.device.type == "mps":  # which has no float64: rays as rows of a table
        column = torch.arange(len(values), device=values.device) - starts
        table = values.new_zeros(n_rays, int(begins.diff().max())).index_put((ray_indices, column), values)
        return (table.cumsum(1) - table)[ray_indices, column]
    wide = values.double()  # one running sum over all rays needs the digits
    before = wide.cumsum(0) - wide
    return (before - before[starts]).clamp_min(0).to(values.dtype)  # a difference may round below 0


def mlp(x: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """Bias-free network: ReLU layers and a last linear one.

    Args:
        x: [S, n_inputs]. layers: weights [n_outputs, n_inputs] each, one or more.
    Returns:
        [S, n_outputs of the last], in the type of a matrix product (autocast's, where that is on).
    """
    if x.device.type == "cpu" and len(x) > _ROWS and not torch.is_grad_enabled():
        return torch.cat([mlp(part, layers) for part in x.split(_ROWS)])
    *hidden, last = layers
    for weight in hidden:
        x = F.relu(F.linear(x, weight), inplace=True)
    return F.linear(x, last)
