"""The device code of the triton kernels; `triton_kernels` holds the functions around it.

This is the one file that imports triton at its top, so it is itself only imported where triton is used.

Letters as in `torch_kernels`: S samples, N rays, D dimensions, C = 2^D corners, F features, L levels. A tile is
[BLOCK, FP]: BLOCK samples and the F features padded to a power of two, so that an entry is read in one piece.
`FUSED` says that a multiplication and an addition are rounded once, as the hardware does it; triton's interpreter
rounds twice, which shows at the finest levels, and so takes float64 there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _axis(x_ptr, rows, valid, scale, factor, d: tl.constexpr, D: tl.constexpr, FUSED: tl.constexpr):
    """One coordinate's part of the entry numbers of its lower corners [BLOCK], and the share of the upper [BLOCK]."""
    if d < D:
        x = tl.load(x_ptr + rows * D + d, mask=valid, other=0.0)
        if FUSED:
            position = tl.fma(x, scale, 0.5)
        else:
            position = (x.to(tl.float64) * scale.to(tl.float64) + 0.5).to(tl.float32)
        low = position.to(tl.int32)
        part, share = low * factor, position - low.to(tl.float32)
    else:
        part, share = tl.zeros_like(rows), tl.zeros_like(rows).to(tl.float32)
    return part, share


@triton.jit
def _axes(x_ptr, rows, valid, scale, f0, f1, f2, f3, D: tl.constexpr, FUSED: tl.constexpr):
    """`_axis` of all coordinates: the four parts, then the four shares."""
    p0, s0 = _axis(x_ptr, rows, valid, scale, f0, 0, D, FUSED)
    p1, s1 = _axis(x_ptr, rows, valid, scale, f1, 1, D, FUSED)
    p2, s2 = _axis(x_ptr, rows, valid, scale, f2, 2, D, FUSED)
    p3, s3 = _axis(x_ptr, rows, valid, scale, f3, 3, D, FUSED)
    return p0, p1, p2, p3, s0, s1, s2, s3


@triton.jit
def _upper(part, factor, c: tl.constexpr, d: tl.constexpr):
    return part + factor if (c >> d) & 1 else part


@triton.jit
def _weight(share, c: tl.constexpr, d: tl.constexpr, D: tl.constexpr):
    """What a corner has of the interpolation along one axis."""
    if d >= D:
        weight = tl.full(share.shape, 1.0, tl.float32)
    elif (c >> d) & 1:
        weight = share
    else:
        weight = 1.0 - share
    return weight


@triton.jit
def _within(xor, total, size, hashed):
    """The entry number within a level, from the coordinates' parts; inside the level whatever the coordinates are."""
    dense, last = total.to(tl.uint32, bitcast=True), (size - 1).to(tl.uint32)
    # at u = 1 the upper corners of a dense level lie beyond its last entry, and start over
    dense = tl.minimum(tl.where(dense > last, dense - size.to(tl.uint32), dense), last)
    return tl.where(hashed, xor & (size - 1), dense.to(tl.int32))


@triton.jit
def _entry(p0, p1, p2, p3, f0, f1, f2, f3, size, hashed, c: tl.constexpr, D: tl.constexpr):
    """The entry number [BLOCK] of corner c within its level."""
    a0, a1, a2, a3 = _upper(p0, f0, c, 0), p1, p2, p3
    if D > 1:
        a1 = _upper(p1, f1, c, 1)
    if D > 2:
        a2 = _upper(p2, f2, c, 2)
    if D > 3:
        a3 = _upper(p3, f3, c, 3)
    return _within(a0 ^ a1 ^ a2 ^ a3, a0 + a1 + a2 + a3, size, hashed)


@triton.jit
def _place(level, scales_ptr, places_ptr):
    """(scale, offset, size, hashed) of a level; places: [L, 3] int32, the last three."""
    scale = tl.load(scales_ptr + level)
    offset, size = tl.load(places_ptr + level * 3), tl.load(places_ptr + level * 3 + 1)
    return scale, offset, size, tl.load(places_ptr + level * 3 + 2) != 0


@triton.jit
def _factors(level, factors_ptr):
    f0, f1 = tl.load(factors_ptr + level * 4), tl.load(factors_ptr + level * 4 + 1)
    return f0, f1, tl.load(factors_ptr + level * 4 + 2), tl.load(factors_ptr + level * 4 + 3)


@triton.jit
def _level(
    x_ptr,
    table_ptr,
    scales_ptr,
    places_ptr,
    factors_ptr,
    rows,
    n_samples,
    level,
    n_active,
    D: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Interpolate one level [BLOCK, FP]; zeros where it is not active."""
    feature = tl.arange(0, FP)
    valid = rows < tl.where(level < n_active, n_samples, 0)
    inside = valid[:, None] & (feature < F)[None, :]
    level = tl.minimum(level, n_active - 1)
    scale, offset, size, hashed = _place(level, scales_ptr, places_ptr)
    f0, f1, f2, f3 = _factors(level, factors_ptr)
    p0, p1, p2, p3, s0, s1, s2, s3 = _axes(x_ptr, rows, valid, scale, f0, f1, f2, f3, D, FUSED)
    total = tl.zeros((rows.shape[0], FP), tl.float32)  # sums are float32, whatever is written
    for c in tl.static_range(1 << D):
        entry = _entry(p0, p1, p2, p3, f0, f1, f2, f3, size, hashed, c, D)
        weight = _weight(s0, c, 0, D) * _weight(s1, c, 1, D) * _weight(s2, c, 2, D) * _weight(s3, c, 3, D)
        numbers = (offset + entry)[:, None] * F + feature[None, :]
        entries = tl.load(table_ptr + numbers, mask=inside, other=0.0, eviction_policy="evict_last")
        total += weight[:, None] * entries
    return total


@triton.jit
def _beside(left, right):
    """Two tiles [BLOCK, n] as one [BLOCK, 2 n], without leaving the registers."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (left.shape[0], 2 * left.shape[1]))


@triton.jit
def hash_forward(
    x_ptr,
    table_ptr,
    out_ptr,
    scales_ptr,
    places_ptr,
    factors_ptr,
    n_samples,
    n_active,
    L: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Interpolate 1, 2 or 4 neighbouring LEVELS (1 where F is no power of two) for BLOCK samples. The programs of one
    group of levels run together, so that its entries stay in the cache. What a sample has of a group is written in one
    piece: level by level the writing would take longer than everything else."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < n_samples
    level = tl.program_id(1) * LEVELS
    total = _level(
        x_ptr, table_ptr, scales_ptr, places_ptr, factors_ptr, rows, n_samples, level, n_active, D, F, FP, FUSED
    )
    if LEVELS > 1:
        second = _level(
            x_ptr, table_ptr, scales_ptr, places_ptr, factors_ptr, rows, n_samples, level + 1, n_active, D, F, FP, FUSED
        )
        total = _beside(total, second)
    if LEVELS > 2:
        third = _level(
            x_ptr, table_ptr, scales_ptr, places_ptr, factors_ptr, rows, n_samples, level + 2, n_active, D, F, FP, FUSED
        )
        fourth = _level(
            x_ptr, table_ptr, scales_ptr, places_ptr, factors_ptr, rows, n_samples, level + 3, n_active, D, F, FP, FUSED
        )
        total = _beside(total, _beside(third, fourth))
    column = tl.arange(0, LEVELS * FP)
    written = tl.minimum(n_active * F - level * F, LEVELS * F)  # levels that are not active stay zero
    to = rows.to(tl.int64)[:, None] * (L * F) + level * F + column[None, :]
    tl.store(out_ptr + to, total, mask=valid[:, None] & (column < written)[None, :])


@triton.jit
def hash_backward_table(
    x_ptr,
    grad_ptr,
    grad_table_ptr,
    scales_ptr,
    places_ptr,
    factors_ptr,
    n_samples,
    L: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    FUSED: tl.constexpr,
    RUNS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Add what RUNS runs of LENGTH samples give to the entries of one level.

    A tile is [RUNS, C * FP]: all corners and features of one sample of each run. Neighbours along a ray mostly lie in
    the same cell of the coarse levels: what they give is summed here and added to the entry when the cell changes. One
    addition a sample would make the whole GPU queue up before a few hundred entries.
    """
    column = tl.arange(0, (1 << D) * FP)
    corner, feature = column // FP, column % FP
    b0, b1, b2, b3 = corner & 1, (corner >> 1) & 1, (corner >> 2) & 1, (corner >> 3) & 1
    level = tl.program_id(1)
    scale, offset, size, hashed = _place(level, scales_ptr, places_ptr)
    f0, f1, f2, f3 = _factors(level, factors_ptr)
    first = (tl.program_id(0) * RUNS + tl.arange(0, RUNS)) * LENGTH
    held = tl.zeros((RUNS, (1 << D) * FP), tl.float32)  # sums that were not added yet
    owner = tl.zeros((RUNS, (1 << D) * FP), tl.int32)  # and the entries that they belong to
    for i in range(LENGTH):
        rows = first + i
        valid = rows < n_samples
        p0, s0 = _axis(x_ptr, rows, valid, scale, f0, 0, D, FUSED)
        part = p0[:, None] + f0 * b0[None, :]
        xor, total = part, part
        weight = tl.where(b0[None, :] == 1, s0[:, None], 1.0 - s0[:, None])
        if D > 1:
            p1, s1 = _axis(x_ptr, rows, valid, scale, f1, 1, D, FUSED)
            part = p1[:, None] + f1 * b1[None, :]
            xor, total = xor ^ part, total + part
            weight *= tl.where(b1[None, :] == 1, s1[:, None], 1.0 - s1[:, None])
        if D > 2:
            p2, s2 = _axis(x_ptr, rows, valid, scale, f2, 2, D, FUSED)
            part = p2[:, None] + f2 * b2[None, :]
            xor, total = xor ^ part, total + part
            weight *= tl.where(b2[None, :] == 1, s2[:, None], 1.0 - s2[:, None])
        if D > 3:
            p3, s3 = _axis(x_ptr, rows, valid, scale, f3, 3, D, FUSED)
            part = p3[:, None] + f3 * b3[None, :]
            xor, total = xor ^ part, total + part
            weight *= tl.where(b3[None, :] == 1, s3[:, None], 1.0 - s3[:, None])
        number = offset + _within(xor, total, size, hashed)
        grad = tl.zeros((RUNS, (1 << D) * FP), tl.float32)
        for k in tl.static_range(F):  # feature by feature: a tile's layout would be changed twice in every step
            of_one = tl.load(grad_ptr + rows.to(tl.int64) * (L * F) + level * F + k, mask=valid, other=0.0)
            grad = tl.where(feature[None, :] == k, of_one.to(tl.float32)[:, None], grad)
        moved = number != owner
        # told that features lie side by side, the compiler gives them to neighbouring threads: one transaction for both
        to = tl.max_contiguous(owner * F + feature[None, :], [1, FP])
        tl.atomic_add(grad_table_ptr + to, held, mask=moved & (held != 0.0), sem="relaxed")
        held = tl.where(moved, 0.0, held) + weight * grad
        owner = number
    to = tl.max_contiguous(owner * F + feature[None, :], [1, FP])
    tl.atomic_add(grad_table_ptr + to, held, mask=held != 0.0, sem="relaxed")


@triton.jit
def _slope(s0, s1, s2, s3, c: tl.constexpr, d: tl.constexpr, D: tl.constexpr):
    """The derivative [BLOCK] of corner c's weight along axis d."""
    slope = tl.full(s0.shape, 1.0 if (c >> d) & 1 else -1.0, tl.float32)
    if d != 0:
        slope *= _weight(s0, c, 0, D)
    if d != 1:
        slope *= _weight(s1, c, 1, D)
    if d != 2:
        slope *= _weight(s2, c, 2, D)
    if d != 3:
        slope *= _weight(s3, c, 3, D)
    return slope


@triton.jit
def hash_backward_points(
    x_ptr,
    table_ptr,
    grad_ptr,
    grad_x_ptr,
    scales_ptr,
    places_ptr,
    factors_ptr,
    n_samples,
    n_active,
    L: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of BLOCK points, summed over all levels."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < n_samples
    feature = tl.arange(0, FP)
    inside = valid[:, None] & (feature < F)[None, :]
    grad_rows = rows.to(tl.int64)[:, None] * (L * F) + feature[None, :]
    g0, g1 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    g2, g3 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    level = 0
    while level < n_active:
        scale, offset, size, hashed = _place(level, scales_ptr, places_ptr)
        f0, f1, f2, f3 = _factors(level, factors_ptr)
        p0, p1, p2, p3, s0, s1, s2, s3 = _axes(x_ptr, rows, valid, scale, f0, f1, f2, f3, D, FUSED)
        grad = tl.load(grad_ptr + grad_rows + level * F, mask=inside, other=0.0).to(tl.float32)
        for c in tl.static_range(1 << D):
            entry = _entry(p0, p1, p2, p3, f0, f1, f2, f3, size, hashed, c, D)
            numbers = (offset + entry)[:, None] * F + feature[None, :]
            value = tl.sum(tl.load(table_ptr + numbers, mask=inside, other=0.0) * grad, 1) * scale
            g0 += value * _slope(s0, s1, s2, s3, c, 0, D)
            if D > 1:
                g1 += value * _slope(s0, s1, s2, s3, c, 1, D)
            if D > 2:
                g2 += value * _slope(s0, s1, s2, s3, c, 2, D)
            if D > 3:
                g3 += value * _slope(s0, s1, s2, s3, c, 3, D)
        level += 1
    tl.store(grad_x_ptr + rows * D, g0, mask=valid)
    if D > 1:
        tl.store(grad_x_ptr + rows * D + 1, g1, mask=valid)
    if D > 2:
        tl.store(grad_x_ptr + rows * D + 2, g2, mask=valid)
    if D > 3:
        tl.store(grad_x_ptr + rows * D + 3, g3, mask=valid)


@triton.jit
def _cell(start_ptr, slope_ptr, rows, valid, middle, d: tl.constexpr, resolution, FUSED: tl.constexpr):
    """The number [RAYS, K] of the cells along one axis."""
    start = tl.load(start_ptr + rows * 3 + d, mask=valid, other=0.0)[:, None]
    slope = tl.load(slope_ptr + rows * 3 + d, mask=valid, other=0.0)[:, None]
    if FUSED:
        along = tl.fma(middle, slope, start)
    else:
        along = (start.to(tl.float64) + middle.to(tl.float64) * slope.to(tl.float64)).to(tl.float32)
    return tl.minimum(tl.maximum(along.to(tl.int32), 0), resolution - 1)


@triton.jit
def march(
    first_ptr,
    last_ptr,
    start_ptr,
    slope_ptr,
    moved_ptr,
    marks_ptr,
    occupied_ptr,
    counts_ptr,
    ray_ptr,
    t_starts_ptr,
    t_ends_ptr,
    n_rays,
    n_marks,
    resolution,
    half_step,
    OCCUPIED: tl.constexpr,
    MOVED: tl.constexpr,
    WRITE: tl.constexpr,
    FUSED: tl.constexpr,
    RAYS: tl.constexpr,
    K: tl.constexpr,
):
    """Walk RAYS rays K lattice points at a time. Without WRITE the intervals of a ray are counted into counts [N];
    with it counts holds where each ray's intervals begin, and they are written there."""
    rows = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    valid = rows < n_rays
    first = tl.load(first_ptr + rows, mask=valid, other=0)
    last = tl.minimum(tl.load(last_ptr + rows, mask=valid, other=-1), n_marks - 2)  # an interval has two marks
    longest = tl.max(last - first) + 1
    moved = tl.load(moved_ptr + rows, mask=valid, other=0.0)[:, None] if MOVED else 0.0
    if WRITE:
        count = tl.load(counts_ptr + rows, mask=valid, other=0)
    else:
        count = tl.zeros((RAYS,), tl.int64)
    begin = 0
    while begin < longest:
        k = first[:, None] + begin + tl.arange(0, K)[None, :]
        keep = k <= last[:, None]
        mark = tl.load(marks_ptr + k, mask=keep, other=0.0)
        if OCCUPIED:
            middle = mark + half_step
            if MOVED:
                middle = middle + moved
            x = _cell(start_ptr, slope_ptr, rows, valid, middle, 0, resolution, FUSED)
            y = _cell(start_ptr, slope_ptr, rows, valid, middle, 1, resolution, FUSED)
            z = _cell(start_ptr, slope_ptr, rows, valid, middle, 2, resolution, FUSED)
            keep = tl.load(occupied_ptr + (x * resolution + y) * resolution + z, mask=keep, other=0) != 0
        kept = keep.to(tl.int32)
        if WRITE:
            place = count[:, None] + (tl.cumsum(kept, 1) - kept)  # after those of the ray that come before
            tl.store(ray_ptr + place, rows[:, None].to(tl.int64) + tl.zeros_like(k), mask=keep)
            end = tl.load(marks_ptr + k + 1, mask=keep, other=0.0)
            tl.store(t_starts_ptr + place, mark + moved, mask=keep)
            tl.store(t_ends_ptr + place, end + moved, mask=keep)
        count += tl.sum(kept, 1)
        begin += K
    if not WRITE:
        tl.store(counts_ptr + rows, count, mask=valid)


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0; near 0 by its series, without the first term that float32 does not show."""
    series = x * (1 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))
    return tl.where(x > -0.125, series, tl.exp(x) - 1)


@triton.jit
def _thickness(density_ptr, t_starts_ptr, t_ends_ptr, sample, there):
    dt = tl.load(t_ends_ptr + sample, mask=there, other=0.0) - tl.load(t_starts_ptr + sample, mask=there, other=0.0)
    return tl.load(density_ptr + sample, mask=there, other=0.0) * dt


@triton.jit
def composite_forward(
    density_ptr,
    values_ptr,
    t_starts_ptr,
    t_ends_ptr,
    bounds_ptr,
    weights_ptr,
    clear_ptr,
    sums_ptr,
    n_rays,
    K: tl.constexpr,
    KP: tl.constexpr,
    RAYS: tl.constexpr,
    C: tl.constexpr,
):
    """Weigh the samples of RAYS rays, C of each at a time. bounds: [N + 1] where a ray's samples begin. clear: [S]
    what reaches a sample, kept for the gradient."""
    rows = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    valid = rows < n_rays
    begin = tl.load(bounds_ptr + rows, mask=valid, other=0)
    end = tl.load(bounds_ptr + rows + 1, mask=valid, other=0)
    longest = tl.max(end - begin).to(tl.int32)
    before = tl.zeros((RAYS,), tl.float32)
    column = tl.arange(0, KP)
    sums = tl.zeros((RAYS, KP), tl.float32)
    start = 0
    while start < longest:
        sample = begin[:, None] + start + tl.arange(0, C)[None, :]
        there = sample < end[:, None]
        thickness = _thickness(density_ptr, t_starts_ptr, t_ends_ptr, sample, there)
        # the sum of the earlier ones is made without the present one, not by taking it off again: it may be large
        earlier = there & (tl.arange(0, C) > 0)[None, :]
        shifted = _thickness(density_ptr, t_starts_ptr, t_ends_ptr, sample - 1, earlier)
        clear = tl.exp(-(before[:, None] + tl.cumsum(shifted, 1)))
        weight = -_expm1(-thickness) * clear
        tl.store(weights_ptr + sample, weight, mask=there)
        tl.store(clear_ptr + sample, clear, mask=there)
        before += tl.sum(thickness, 1)
        for k in tl.static_range(K):
            value = tl.load(values_ptr + sample * K + k, mask=there, other=0.0)
            sums += tl.sum(weight * value, 1)[:, None] * (column == k)[None, :].to(tl.float32)
        start += C
    tl.store(sums_ptr + rows[:, None] * K + column[None, :], sums, mask=valid[:, None] & (column < K)[None, :])


@triton.jit
def composite_backward(
    density_ptr,
    values_ptr,
    t_starts_ptr,
    t_ends_ptr,
    bounds_ptr,
    weights_ptr,
    clear_ptr,
    grad_weights_ptr,
    grad_sums_ptr,
    grad_density_ptr,
    grad_values_ptr,
    n_rays,
    K: tl.constexpr,
    RAYS: tl.constexpr,
    C: tl.constexpr,
):
    """dL/dthickness_i = G_i (T_i - w_i) - sum of G_j w_j over later j, with G_i = dL/dw_i in all: walked backwards."""
    rows = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    valid = rows < n_rays
    begin = tl.load(bounds_ptr + rows, mask=valid, other=0)
    end = tl.load(bounds_ptr + rows + 1, mask=valid, other=0)
    longest = tl.max(end - begin).to(tl.int32)
    later = tl.zeros((RAYS,), tl.float32)
    start = 0
    while start < longest:
        sample = end[:, None] - 1 - start - tl.arange(0, C)[None, :]  # the last ones first
        there = sample >= begin[:, None]
        dt = tl.load(t_ends_ptr + sample, mask=there, other=0.0) - tl.load(t_starts_ptr + sample, mask=there, other=0.0)
        weight = tl.load(weights_ptr + sample, mask=there, other=0.0)
        clear = tl.load(clear_ptr + sample, mask=there, other=0.0)
        grad = tl.load(grad_weights_ptr + sample, mask=there, other=0.0)
        for k in tl.static_range(K):
            of_sum = tl.load(grad_sums_ptr + rows * K + k, mask=valid, other=0.0)[:, None]
            value = tl.load(values_ptr + sample * K + k, mask=there, other=0.0)
            grad += of_sum * value
            tl.store(grad_values_ptr + sample * K + k, weight * of_sum, mask=there)
        share = grad * weight
        suffix = later[:, None] + tl.cumsum(share, 1) - share  # sum of G_j w_j over later j
        tl.store(grad_density_ptr + sample, dt * (grad * (clear - weight) - suffix), mask=there)
        later += tl.sum(share, 1)

        start += C


@triton.jit
def sum_rays(values_ptr, bounds_ptr, sums_ptr, n_rays, K: tl.constexpr, RAYS: tl.constexpr, C: tl.constexpr):
    """Sum K columns over the samples of RAYS rays."""
    rows = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    valid = rows < n_rays
    begin = tl.load(bounds_ptr + rows, mask=valid, other=0)
    end = tl.load(bounds_ptr + rows + 1, mask=valid, other=0)
    longest = tl.max(end - begin).to(tl.int32)
    for k in tl.static_range(K):
        total = tl.zeros((RAYS,), tl.float32)
        start = 0
        while start < longest:
            sample = begin[:, None] + start + tl.arange(0, C)[None, :]
            total += tl.sum(tl.load(values_ptr + sample * K + k, mask=sample < end[:, None], other=0.0), 1)
            start += C
        tl.store(sums_ptr + rows * K + k, total, mask=valid)
