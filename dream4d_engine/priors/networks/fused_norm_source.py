"""The device code of the fused norm; `fused_norm` holds the functions around it, and the formulas.

Letters as there: n an image, r its rows (places), c its channels; a tile is BLOCK_R rows and BLOCK_C channels. Numbers
of channels lie in float32 as `found` [4, images, c] (a, b, mean - offset, rstd), `line` [2, images, c] (slope and
constant of the gradient in x) and `partial` [2, images, parts, c] (what each program summed of two things).
Imports triton at its top.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sums(x, out, images, r, c, per, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    part, n = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    first = n.to(tl.int64) * r * c
    for start in range(0, per, BLOCK_R):
        row = part * per + start + tl.arange(0, BLOCK_R)
        at = first + row[:, None].to(tl.int64) * c + channel[None]
        value = tl.load(x + at, mask=(row[:, None] < r) & (channel[None] < c), other=0.0).to(tl.float32)
        total += value
        square += value * value
    to = (n * tl.num_programs(0) + part) * c + channel
    second = images * tl.num_programs(0) * c
    tl.store(out + to, tl.sum(total, 0), mask=channel < c)
    tl.store(out + second + to, tl.sum(square, 0), mask=channel < c)


@triton.jit
def statistics(
    partial, weight, bias, offset, offset_stride, found, eps, HAS_OFFSET: tl.constexpr,
    images, r, c, width, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    g, n = tl.program_id(0), tl.program_id(1)
    inside = tl.arange(0, BLOCK_C) < width
    channel = g * width + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        at = (n * parts + part[:, None]) * c + channel[None]
        mask = (part[:, None] < parts) & inside[None]
        total += tl.load(partial + at, mask=mask, other=0.0)
        square += tl.load(partial + images * parts * c + at, mask=mask, other=0.0)
    s1, s2 = tl.sum(total, 0), tl.sum(square, 0)
    shift = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_OFFSET:
        shift = tl.load(offset + n * offset_stride + channel, mask=inside, other=0.0).to(tl.float32)
    # sums of x + offset, from those of x
    s2 += 2 * shift * s1 + r * shift * shift
    s1 += r * shift
    count = r * width
    mean = tl.sum(s1, 0) / count
    variance = tl.maximum(tl.sum(s2, 0) / count - mean * mean, 0.0)
    rstd = 1 / tl.sqrt(variance + eps)
    a = rstd * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32) + (shift - mean) * a
    to, step = found + n * c + channel, images * c
    tl.store(to, a, mask=inside)
    tl.store(to + step, b, mask=inside)
    tl.store(to + 2 * step, mean - shift, mask=inside)
    tl.store(to + 3 * step, rstd + tl.zeros((BLOCK_C,), tl.float32), mask=inside)


@triton.jit
def gradient_sums(
    x, grad, found, out, images, r, c, per,
    SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part, n = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    a = tl.load(found + n * c + channel, mask=channel < c, other=0.0)
    b = tl.load(found + images * c + n * c + channel, mask=channel < c, other=0.0)
    first = n.to(tl.int64) * r * c
    for start in range(0, per, BLOCK_R):
        row = part * per + start + tl.arange(0, BLOCK_R)
        at = first + row[:, None].to(tl.int64) * c + channel[None]
        mask = (row[:, None] < r) & (channel[None] < c)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        dv = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            v = value * a[None] + b[None]
            s = tl.sigmoid(v)
            dv = dv * s * (1 + v * (1 - s))
        total += dv
        product += dv * value
    to = (n * tl.num_programs(0) + part) * c + channel
    second = images * tl.num_programs(0) * c
    tl.store(out + to, tl.sum(total, 0), mask=channel < c)
    tl.store(out + second + to, tl.sum(product, 0), mask=channel < c)


@triton.jit
def gradient_line(
    partial, weight, found, line, images, r, c, width, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    g, n = tl.program_id(0), tl.program_id(1)
    inside = tl.arange(0, BLOCK_C) < width
    channel = g * width + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        at = (n * parts + part[:, None]) * c + channel[None]
        mask = (part[:, None] < parts) & inside[None]
        total += tl.load(partial + at, mask=mask, other=0.0)
        product += tl.load(partial + images * parts * c + at, mask=mask, other=0.0)
    at, step = found + n * c + channel, images * c
    mean = tl.load(at + 2 * step, mask=inside, other=0.0)
    rstd = tl.load(at + 3 * step, mask=inside, other=0.0)
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    s1, s2 = tl.sum(total, 0), tl.sum(product, 0)
    count = r * width
    c1 = tl.sum(w * s1, 0) / count
    c2 = tl.sum(w * (s2 - mean * s1) * rstd, 0) / count
    slope = -rstd * rstd * c2
    tl.store(line + n * c + channel, slope, mask=inside)
    tl.store(line + step + n * c + channel, -rstd * c1 - mean * slope, mask=inside)


@triton.jit
def apply(
    x, found, out, images, r, c,
    SILU: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    a = tl.load(found + n * c + channel, mask=channel < c, other=0.0)
    b = tl.load(found + images * c + n * c + channel, mask=channel < c, other=0.0)
    first = n.to(tl.int64) * r * c
    for step in tl.static_range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        at = first + row[:, None].to(tl.int64) * c + channel[None]
        mask = (row[:, None] < r) & (channel[None] < c)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * a[None] + b[None]
        if SILU:
            v = v * tl.sigmoid(v)
        tl.store(out + at, v.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gradient(
    x, grad, found, line, more, out, images, r, c,
    SILU: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    # MORE: `more` is added, a gradient that came another way
    n = tl.program_id(1)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    second = images * c
    a = tl.load(found + n * c + channel, mask=channel < c, other=0.0)
    b = tl.load(found + second + n * c + channel, mask=channel < c, other=0.0)
    p = tl.load(line + n * c + channel, mask=channel < c, other=0.0)
    q = tl.load(line + second + n * c + channel, mask=channel < c, other=0.0)
    first = n.to(tl.int64) * r * c
    for step in tl.static_range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        at = first + row[:, None].to(tl.int64) * c + channel[None]
        mask = (row[:, None] < r) & (channel[None] < c)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        dv = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            v = value * a[None] + b[None]
            s = tl.sigmoid(v)
            dv = dv * s * (1 + v * (1 - s))
        dx = a[None] * dv + p[None] * value + q[None]
        if MORE:
            dx += tl.load(more + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, dx.to(out.dtype.element_ty), mask=mask)


@triton.jit
def shift(x, bias, n, c, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    value = tl.load(x + at, mask=mask).to(tl.float32)
    value += tl.load(bias + (at % c).to(tl.int32), mask=mask).to(tl.float32)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def double(x, out, height, width, c, BLOCK: tl.constexpr):
    # one program: a stretch of channels of one place, written to its four places
    place, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place * c + channel, mask=channel < c)
    row, column = place // width, place % width  # rows of all images
    to = ((2 * row) * (2 * width) + 2 * column) * c + channel
    tl.store(out + to, value, mask=channel < c)
    tl.store(out + to + c, value, mask=channel < c)
    tl.store(out + to + 2 * width * c, value, mask=channel < c)
    tl.store(out + to + (2 * width + 1) * c, value, mask=channel < c)


@triton.jit
def residual(x, h, bias, out, n, c, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    value = tl.load(x + at, mask=mask).to(tl.float32) + tl.load(h + at, mask=mask).to(tl.float32)
    value += tl.load(bias + (at % c).to(tl.int32), mask=mask).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rms(
    x, weight, grad, out, r, c, eps,
    WEIGHTED: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # all channels of a row are in one tile: v = x f w with f = 1 / sqrt(mean(x^2) + eps), y = silu(v)
    channel = tl.arange(0, BLOCK_C)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = row[:, None] * c + channel[None]
    mask = (row[:, None] < r) & (channel[None] < c)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    factor = 1 / tl.sqrt(tl.sum(value * value, 1) / c + eps)
    normed = value * factor[:, None]
    v = normed
    w = tl.full((BLOCK_C,), 1.0, tl.float32)
    if WEIGHTED:
        w = tl.load(weight + channel, mask=channel < c, other=0.0).to(tl.float32)
        v = normed * w[None]
    s = tl.sigmoid(v)
    if BACKWARD:
        # with u = x f: dx = f (du - u mean(du u)), du = dy silu'(v) w
        du = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * s * (1 + v * (1 - s)) * w[None]
        along = tl.sum(du * normed, 1) / c
        result = factor[:, None] * (du - normed * along[:, None])
    else:
        result = v * s
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)
