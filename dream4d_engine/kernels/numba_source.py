"""The loops of the numba kernels; `numba_kernels` holds the functions around them.

This is the one file that imports numba at its top, so it is itself only imported where numba is used.

Letters as in `torch_kernels`: S samples, N rays, D dimensions, C = 2^D corners, F features, L levels. A block is up to
BLOCK samples: what is known of it [C, BLOCK] stays in the first-level cache, and loops along it become vector
instructions. For that they read and write at most three rows each: a compiler checks no more of them for overlaps.
Every loop can be given a part of the samples, rays or levels; none lets go of the GIL's benefits or depends on the
order of the parts, so results are the same, bit for bit, on any number of threads.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from numba import int32, njit, uint32

BLOCK = 128
_MOST_CORNERS = 16


# contract: a multiplication and an addition may be rounded once; nothing else about floats is loosened
_OPTIONS = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
_inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)  # called by compiled functions alone


def _compiled(function: Callable) -> Callable:
    """Compile on first use; the result is kept on disk, for the next process, where that can be written to.

    What is kept names the module that it was compiled in, and can't be read where that has another name: ComfyUI
    imports the pack, and this with it, as something else than a command line does. So each name keeps its own.
    """
    function.__qualname__ += f"_{zlib.crc32(__name__.encode()):08x}"
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither beside this file nor in the user's own cache
        return njit(**_OPTIONS)(function)


# ---- hash encoding -------------------------------------------------------------------------------------------------


@_inner
def _take_block(x, first, n, block):
    """Bring the points x [S, D] from `first` on into block [D, BLOCK]."""
    for s in range(n):
        for d in range(x.shape[1]):
            block[d, s] = x[first + s, d]


@_inner
def _place(u, scale, factor, low, share):
    """One coordinate's part of the entry numbers of lower corners [BLOCK], and the share of the upper ones."""
    for s in range(len(u)):
        position = np.float32(np.float64(u[s]) * scale + 0.5)  # rounded once, see torch_kernels._position
        whole = int32(position)
        share[s] = position - np.float32(whole)
        low[s] = uint32(whole) * factor


@_inner
def _grow_hashed(entry, upper, low, factor):
    for s in range(len(low)):
        before, here = entry[s], low[s]
        upper[s] = before ^ (here + factor)
        entry[s] = before ^ here


@_inner
def _grow_dense(entry, upper, low, factor):
    for s in range(len(low)):
        here = entry[s] + low[s]
        upper[s] = here + factor
        entry[s] = here


@_inner
def _keep_low_bits(entry, mask):
    for s in range(len(entry)):
        entry[s] &= mask


@_inner
def _start_over(entry, size):
    """What lies beyond the last entry starts over, see torch_kernels._wrapped_entries."""
    for s in range(len(entry)):
        number = entry[s]
        number = min(number, number - size)  # unsigned: below the size the difference is large
        entry[s] = min(number, size - uint32(1))  # of no number (NaN), no entry


@_inner
def _find_corners(block, scale, place, factors, entry, share):
    """Write a block's entry numbers [C, BLOCK] and shares of the upper corners [D, BLOCK]; return C.

    Corner c is the upper one along the coordinates whose bits of c are set. place: a level's (offset, size, hashed).
    """
    size, hashed = uint32(place[1]), place[2] != 0
    low = entry[_MOST_CORNERS]
    entry[0] = 0
    n_corners = 1
    for d in range(block.shape[0]):
        _place(block[d], scale, factors[d], low, share[d])
        for c in range(n_corners):
            if hashed:
                _grow_hashed(entry[c], entry[n_corners + c], low, factors[d])
            else:
                _grow_dense(entry[c], entry[n_corners + c], low, factors[d])
        n_corners *= 2
    for c in range(n_corners):
        if hashed:
            _keep_low_bits(entry[c], size - uint32(1))  # the size is a power of two
        else:
            _start_over(entry[c], size)
    return n_corners


@_inner
def _grow_weights(weight, upper, share):
    for s in range(len(share)):
        whole = weight[s]
        part = whole * share[s]
        upper[s] = part
        weight[s] = whole - part


@_inner
def _weigh_corners(share, weight):
    """Write the weights [C, BLOCK] of a block's corners in the interpolation."""
    weight[0] = 1
    n_corners = 1
    for d in range(share.shape[0]):
        for c in range(n_corners):
            _grow_weights(weight[c], weight[n_corners + c], share[d])
        n_corners *= 2


@_compiled
def encode(x, table, out, layout, n_levels, begin, end):
    """Interpolate the samples begin <= s < end: x [S, D], table [T * F], into out [S, L * F].

    layout: scales [L] float64, places [L, 3] int64 (offset, size, hashed), factors [L, D] uint32, F.
    """
    scales, places, factors, n_features = layout
    n_dims = x.shape[1]
    block, share = np.zeros((n_dims, BLOCK), np.float32), np.empty((n_dims, BLOCK), np.float32)
    entry = np.empty((_MOST_CORNERS + 1, BLOCK), np.uint32)
    weight = np.empty((_MOST_CORNERS, BLOCK), np.float32)
    for first in range(begin, end, BLOCK):
        n = min(BLOCK, end - first)
        _take_block(x, first, n, block)
        for level in range(n_levels):
            n_corners = _find_corners(block, scales[level], places[level], factors[level], entry, share)
            _weigh_corners(share, weight)
            part = table[places[level, 0] * n_features :]
            column = level * n_features
            if n_features == 2:
                for s in range(n):
                    a = b = np.float32(0)
                    for c in range(n_corners):
                        number = np.int64(entry[c, s]) * 2
                        a += weight[c, s] * part[number]
                        b += weight[c, s] * part[number + 1]
                    out[first + s, column], out[first + s, column + 1] = a, b
            else:
                for s in range(n):
                    for f in range(n_features):
                        a = np.float32(0)
                        for c in range(n_corners):
                            a += weight[c, s] * part[np.int64(entry[c, s]) * n_features + f]
                        out[first + s, column + f] = a


@_compiled
def encode_table_gradient(x, grad, grad_table, layout, begin, end):
    """Add what the samples say of the levels begin <= l < end to grad_table [T * F], sample after sample."""
    scales, places, factors, n_features = layout
    n_dims, n_samples = x.shape[1], len(x)
    block, share = np.zeros((n_dims, BLOCK), np.float32), np.empty((n_dims, BLOCK), np.float32)
    entry = np.empty((_MOST_CORNERS + 1, BLOCK), np.uint32)
    weight = np.empty((_MOST_CORNERS, BLOCK), np.float32)
    for first in range(0, n_samples, BLOCK):
        n = min(BLOCK, n_samples - first)
        _take_block(x, first, n, block)
        for level in range(begin, end):
            n_corners = _find_corners(block, scales[level], places[level], factors[level], entry, share)
            _weigh_corners(share, weight)
            part = grad_table[places[level, 0] * n_features :]
            column = level * n_features
            if n_features == 2:
                for s in range(n):
                    a, b = grad[first + s, column], grad[first + s, column + 1]
                    for c in range(n_corners):
                        number = np.int64(entry[c, s]) * 2
                        part[number] += weight[c, s] * a
                        part[number + 1] += weight[c, s] * b
            else:
                for s in range(n):
                    for c in range(n_corners):
                        number = np.int64(entry[c, s]) * n_features
                        for f in range(n_features):
                            part[number + f] += weight[c, s] * grad[first + s, column + f]


@_inner
def _subtract(low, high, out):
    for s in range(len(out)):
        out[s] = high[s] - low[s]


@_inner
def _interpolate(low, high, share):
    """Into `low`."""
    for s in range(len(share)):
        low[s] += share[s] * (high[s] - low[s])


@_inner
def _add_scaled(total, values, scale):
    for s in range(len(total)):
        total[s] += scale * values[s]


@_compiled
def encode_points_gradient(x, table, grad, grad_x, layout, n_levels, begin, end):
    """Write the points' gradient [S, D] of the samples begin <= s < end."""
    scales, places, factors, n_features = layout
    n_dims = x.shape[1]
    block, share = np.zeros((n_dims, BLOCK), np.float32), np.empty((n_dims, BLOCK), np.float32)
    entry = np.empty((_MOST_CORNERS + 1, BLOCK), np.uint32)
    value = np.zeros((_MOST_CORNERS, BLOCK), np.float32)
    slope, total = np.empty((_MOST_CORNERS, BLOCK), np.float32), np.empty((n_dims, BLOCK), np.float32)
    for first in range(begin, end, BLOCK):
        n = min(BLOCK, end - first)
        _take_block(x, first, n, block)
        total[:] = 0
        for level in range(n_levels):
            n_corners = _find_corners(block, scales[level], places[level], factors[level], entry, share)
            part = table[places[level, 0] * n_features :]
            column = level * n_features
            if n_features == 2:
                for s in range(n):
                    a, b = grad[first + s, column], grad[first + s, column + 1]
                    for c in range(n_corners):
                        number = np.int64(entry[c, s]) * 2
                        value[c, s] = part[number] * a + part[number + 1] * b
            else:
                for s in range(n):
                    for c in range(n_corners):
                        number = np.int64(entry[c, s]) * n_features
                        a = np.float32(0)
                        for f in range(n_features):
                            a += part[number + f] * grad[first + s, column + f]
                        value[c, s] = a
            half = n_corners
            for d in range(n_dims - 1, -1, -1):  # the last coordinate is the highest bit of c
                half //= 2
                for c in range(half):
                    _subtract(value[c], value[half + c], slope[c])
                    _interpolate(value[c], value[half + c], share[d])
                rest = half
                for other in range(d - 1, -1, -1):
                    rest //= 2
                    for c in range(rest):
                        _interpolate(slope[c], slope[rest + c], share[other])
                _add_scaled(total[d], slope[0], np.float32(scales[level]))
        for s in range(n):
            for d in range(n_dims):
                grad_x[first + s, d] = total[d, s]


# ---- marching ------------------------------------------------------------------------------------------------------


@_compiled
def march(rays, marks, cells, half_step, found, lists, begin, end):
    """Walk the rays begin <= n < end: count their intervals into found [N], or write them where `lists` have room.

    Args:
        rays: first and last number [N] of a middle in the box, starts and slopes [N, 3] in cells, offsets [N].
        marks: multiples of the step. cells: [R, R, R] bool, which are occupied; R = 0: all.
        lists: ray indices, starts and ends [S]. found: when writing, where in the lists a ray's intervals begin.
    """
    first, last, start, slope, moved = rays
    ray, t_starts, t_ends = lists
    resolution = len(cells)
    highest = resolution - 1
    write = len(ray) > 0
    for n in range(begin, end):
        at = found[n] if write else 0
        for k in range(first[n], last[n] + 1):
            if resolution:
                t = np.float64(marks[k] + half_step + moved[n])
                # rounded once, as other backends do it
                x = int32(np.float32(start[n, 0] + t * slope[n, 0]))
                y = int32(np.float32(start[n, 1] + t * slope[n, 1]))
                z = int32(np.float32(start[n, 2] + t * slope[n, 2]))
                if not cells[min(max(x, 0), highest), min(max(y, 0), highest), min(max(z, 0), highest)]:
                    continue
            if write:
                ray[at], t_starts[at], t_ends[at] = n, marks[k] + moved[n], marks[k + 1] + moved[n]
            at += 1
        if not write:
            found[n] = at


# ---- compositing ---------------------------------------------------------------------------------------------------


@_compiled
def find_rays(ray_indices, bounds):
    """Write where each ray's samples begin in the list, and the list's length: bounds [N + 1]."""
    at = 0
    for n in range(len(bounds)):
        while at < len(ray_indices) and ray_indices[at] < n:
            at += 1
        bounds[n] = at


@_compiled
def composite(density, values, t_starts, t_ends, bounds, weights, clear, sums, begin, end):
    """Weigh the samples of the rays begin <= n < end and sum their values [S, K] into sums [N, K].

    clear [S]: what is left of a ray's light behind each sample.
    """
    for n in range(begin, end):
        before = 0.0
        for s in range(bounds[n], bounds[n + 1]):
            thickness = density[s] * (t_ends[s] - t_starts[s])
            light, loss = np.exp(-np.float32(before)), np.expm1(-thickness)
            weights[s], clear[s] = -loss * light, light + loss * light
            before += thickness
            for k in range(values.shape[1]):
                sums[n, k] += weights[s] * values[s, k]


@_compiled
def composite_gradient(
    values, lengths, bounds, weights, clear, grad_weights, grad_sums, grad_density, grad_values, begin, end
):
    """Write the gradients of `composite`; lengths [S] = t_ends - t_starts."""
    for n in range(begin, end):
        behind = 0.0  # what the weights behind lose when this sample grows thicker
        for s in range(bounds[n + 1] - 1, bounds[n] - 1, -1):
            pull = grad_weights[s]
            for k in range(values.shape[1]):
                pull += grad_sums[n, k] * values[s, k]
                grad_values[s, k] = grad_sums[n, k] * weights[s]
            grad_density[s] = np.float32(np.float64(pull) * clear[s] - behind) * lengths[s]
            behind += np.float64(pull) * weights[s]


@_compiled
def sum_rays(values, bounds, sums, begin, end):
    """Sum the values [S, K] of the rays begin <= n < end into sums [N, K]."""
    for n in range(begin, end):
        for s in range(bounds[n], bounds[n + 1]):
            for k in range(values.shape[1]):
                sums[n, k] += values[s, k]
