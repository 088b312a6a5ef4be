"""Group normalisation with SiLU for networks in channels_last, forward and backward, as two passes over memory.

PyTorch's own group norm turns channels_last around and back, which costs more than the convolutions gain from it.
Here an image is R rows of C channels; one kernel sums rows per channel, a small one makes a factor and a constant
for each channel of that, one applies them. With g the group of channel c, mean and rstd those of (image, group):

    v = a x + b,  a = rstd_g w_c,  b = bias_c + (offset_c - mean_g) a,  y = silu(v)
    dx = a dv - rstd_g (c1 + xhat c2),  dv = dy silu'(v),  c1 = mean_g(w dv),  c2 = mean_g(w dv xhat)

Weights get no gradient: they belong to frozen networks. The plain PyTorch twin is used where Triton isn't.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as functional
from torch import Tensor

from ...kernels import triton_kernels

tl = triton = None  # modules, set by _kernels: Triton's compiler looks names up here

# channels of one program at most, and elements of one tile
_MAX_CHANNELS, _TILE = 2048, 4096


def norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    n_groups: int,
    eps: float,
    silu: bool = True,
    offset: Tensor | None = None,
) -> Tensor:
    """Return silu(group_norm(x + offset)), or without the silu.

    Args:
        x: [N, C, ...]. offset: [N, C] or [1, C], what is added to every place of an image's channels, no gradient.
    """
    if _runs_on(x):
        rows = _rows_of(x)
        if rows is not None:
            return _NormSilu.apply(x, rows, weight, bias, n_groups, eps, silu, offset)
    if offset is not None:
        x = x + offset.reshape(*offset.shape, *[1] * (x.ndim - 2))
    normed = functional.group_norm(x, n_groups, weight, bias, eps)
    return functional.silu(normed) if silu else normed


def _runs_on(x: Tensor) -> bool:
    return (
        x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16, torch.float32) and has_triton(x.device)
    )


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device: it may be there and lack the C compiler that it starts kernels with."""
    try:
        triton_kernels.check(device)
    except (ImportError, RuntimeError):
        return False
    return True


def _rows_of(x: Tensor) -> tuple[int, int] | None:
    """(N, R) of x [N, C, ...] if its memory is [N, R, C] without gaps, else None."""
    last = x.movedim(1, -1)
    return (x.shape[0], x[0, 0].numel()) if last.is_contiguous() and x.ndim > 2 else None


class _NormSilu(torch.autograd.Function):
    """x [N, C, ...] in channels_last; returns the same."""

    @staticmethod
    def forward(ctx, x, rows, weight, bias, n_groups, eps, silu, offset):
        (n, r), c = rows, x.shape[1]
        partial = _sum_rows("sums", n, r, c, x)
        # mean and rstd of each channel's group, and the factor and constant that make v of x
        found = torch.empty(4, n, c, device=x.device)
        shift, stride = (x, 0) if offset is None else (offset, c if len(offset) == n and n > 1 else 0)
        _finish("statistics", n, r, c, n_groups, partial, weight, bias, shift, stride, found, eps, offset is not None)
        out = torch.empty_like(x)
        _launch_rows("apply", n, r, c, x, found, out, silu)
        if x.requires_grad:
            ctx.save_for_backward(x, found, weight)
            ctx.settings = n, r, c, n_groups, silu
        return out

    @staticmethod
    def backward(ctx, grad):
        x, found, weight = ctx.saved_tensors
        n, r, c, n_groups, silu = ctx.settings
        if not grad.movedim(1, -1).is_contiguous():
            grad = grad.contiguous(memory_format=_format(grad))
        partial = _sum_rows("gradient_sums", n, r, c, x, grad, found, silu)
        line = torch.empty(2, n, c, device=x.device)
        _finish("gradient_line", n, r, c, n_groups, partial, weight, found, line)
        out = torch.empty_like(x)
        _launch_rows("gradient", n, r, c, x, grad, found, line, out, silu)
        return out, None, None, None, None, None, None, None


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last_3d if x.ndim == 5 else torch.channels_last


def _tile(c: int) -> tuple[int, int]:
    """(rows, channels) of a program's tile."""
    channels = min(1 << (c - 1).bit_length(), _MAX_CHANNELS)
    return max(1, _TILE // channels), channels


def _parts(n: int, r: int, block_rows: int) -> tuple[int, int]:
    """(programs an image, rows of each): enough programs to fill a GPU, few partial sums."""
    programs = max(1, min(-(-r // block_rows), 2048 // n))
    per = -(-r // programs)
    per = -(-per // block_rows) * block_rows
    return -(-r // per), per


def _sum_rows(name: str, n: int, r: int, c: int, *arguments) -> Tensor:
    """Run a kernel that sums two things over rows: [2, n, parts, c] partial sums, float32."""
    tensors, silu = ([*arguments[:-1]], {"SILU": arguments[-1]}) if len(arguments) > 1 else (arguments, {})
    block_rows, block_c = _tile(c)
    parts, per = _parts(n, r, block_rows)
    out = torch.empty(2, n, parts, c, device=arguments[0].device)
    grid = (parts, n, -(-c // block_c))
    _kernels()[name][grid](*tensors, out, n, r, c, per, BLOCK_R=block_rows, BLOCK_C=block_c, **silu)
    return out


def _finish(name: str, n: int, r: int, c: int, n_groups: int, partial: Tensor, *arguments) -> None:
    """Run a kernel that makes per-channel numbers of partial sums, one program a group of an image."""
    width, parts = c // n_groups, partial.shape[2]
    block_c = 1 << (width - 1).bit_length()
    block_p = min(1 << (parts - 1).bit_length(), max(1, 2048 // block_c))
    _kernels()[name][(n_groups, n)](partial, *arguments, n, r, c, width, parts, BLOCK_P=block_p, BLOCK_C=block_c)


def _launch_rows(name: str, n: int, r: int, c: int, *arguments) -> None:
    """Run an elementwise kernel; its last argument is whether there is a silu."""
    *tensors, silu = arguments
    block_rows, block_c = _tile(c)
    per = block_rows * 4
    grid = (-(-r // per), n, -(-c // block_c))
    _kernels()[name][grid](*tensors, n, r, c, SILU=silu, STEPS=4, BLOCK_R=block_rows, BLOCK_C=block_c)


def add_residual(x: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
    """Return x + h + bias, bias [C] on the channels of x [N, C, ...] (no gradient); one pass over memory."""
    if bias is None:
        return x + h
    if _runs_on(x) and _rows_of(x) is not None and _rows_of(h) is not None:
        return _AddResidual.apply(x, h, bias)
    return x + (h + bias.reshape(-1, *[1] * (x.ndim - 2)))


@torch.no_grad()
def add_bias_(x: Tensor, bias: Tensor | None) -> Tensor:
    """Add bias [C] to the channels of x [N, C, ...] in place and return x; no gradient is captured."""
    if bias is None:
        return x
    if not _runs_on(x) or _rows_of(x) is None:
        return x.add_(bias.reshape(-1, *[1] * (x.ndim - 2)))
    n, c = x.numel(), x.shape[1]
    _kernels()["shift"][(-(-n // 4096),)](x, bias, n, c, BLOCK=4096)
    return x


class _AddResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, bias):
        out = torch.empty_like(x)
        n, c = x.numel(), x.shape[1]
        _kernels()["residual"][(-(-n // 4096),)](x, h, bias, out, n, c, BLOCK=4096)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, grad, None


def double_size(x: Tensor) -> Tensor:
    """Return x [N, C, H, W] with every place repeated twice along both sides."""
    if not _runs_on(x) or (torch.is_grad_enabled() and x.requires_grad) or _rows_of(x) is None:
        return functional.interpolate(x, scale_factor=2.0, mode="nearest")
    n, c, height, width = x.shape
    out = x.new_empty(n, 2 * height, 2 * width, c).permute(0, 3, 1, 2)
    block = min(1 << (c - 1).bit_length(), 1024)
    _kernels()["double"][(n * height * width, -(-c // block))](x, out, height, width, c, BLOCK=block, num_warps=2)
    return out


@functools.cache
def _kernels() -> dict:
    """Define the kernels on first use: importing this file needs no Triton."""
    global tl, triton
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
        x, grad, found, line, out, images, r, c,
        SILU: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
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

    found = (sums, statistics, gradient_sums, gradient_line, apply, gradient, residual, shift, double)
    return {f.fn.__name__: f for f in found}
