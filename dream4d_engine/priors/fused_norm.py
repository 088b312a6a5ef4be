"""Group normalisation with SiLU for networks in channels_last, forward and backward, as two passes over memory.

PyTorch's own group norm turns channels_last around and back, which costs more than the convolutions gain from it.
Here a picture is R rows of C channels; one kernel sums rows per channel, one applies a per-channel factor and
offset. With g the group of channel c, mean and rstd those of (picture, group):

    v = a x + b,  a = rstd_g w_c,  b = bias_c + (offset_c - mean_g) a,  y = silu(v)
    dx = a dv - rstd_g (c1 + xhat c2),  dv = dy silu'(v),  c1 = mean_g(w dv),  c2 = mean_g(w dv xhat)

Weights get no gradient: they belong to frozen networks. The plain PyTorch twin is used where Triton isn't.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as functional
from torch import Tensor

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
        x: [N, C, ...]. offset: [N, C] or [1, C], what is added to every place of a picture's channels, no gradient.
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
    return x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16, torch.float32) and has_triton()


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    try:
        _kernels()
    except ImportError:
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
        n, r = rows
        c = x.shape[1]
        total, squares = channel_sums(x, n, r, c)
        shift = torch.zeros(1, c, device=x.device) if offset is None else offset.float()
        # sums of x + offset, from those of x
        squares = squares + 2 * shift * total + r * shift.square()
        total = total + r * shift
        count = r * c // n_groups
        mean = total.view(n, n_groups, -1).sum(-1) / count
        variance = squares.view(n, n_groups, -1).sum(-1) / count - mean.square()
        rstd = (variance.clamp_min(0) + eps).rsqrt()
        mean, rstd = (v.repeat_interleave(c // n_groups, 1, output_size=c) for v in (mean, rstd))
        factor = rstd * weight.float()
        constant = bias.float() + (shift - mean) * factor
        out = torch.empty_like(x)
        _launch_rows("apply", n, r, c, x, factor, constant, out, silu)
        if x.requires_grad:
            ctx.save_for_backward(x, factor, constant, mean - shift, rstd, weight)
            ctx.settings = n, r, c, n_groups, silu
        return out

    @staticmethod
    def backward(ctx, grad):
        x, factor, constant, mean, rstd, weight = ctx.saved_tensors
        n, r, c, n_groups, silu = ctx.settings
        if not grad.movedim(1, -1).is_contiguous():
            grad = grad.contiguous(memory_format=_format(grad))
        total, products = gradient_sums(x, grad, factor, constant, n, r, c, silu)
        w = weight.float()
        count = r * c // n_groups

        def per_group(values: Tensor) -> Tensor:
            summed = values.view(n, n_groups, -1).sum(-1) / count
            return summed.repeat_interleave(c // n_groups, 1, output_size=c)

        c1 = per_group(w * total)
        c2 = per_group(w * (products - mean * total) * rstd)
        slope = -rstd.square() * c2
        constant2 = -rstd * c1 - mean * slope
        out = torch.empty_like(x)
        _launch_rows("gradient", n, r, c, x, grad, factor, constant, slope, constant2, out, silu)
        return out, None, None, None, None, None, None, None


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last_3d if x.ndim == 5 else torch.channels_last


def _tile(c: int) -> tuple[int, int]:
    """(rows, channels) of a program's tile."""
    channels = min(1 << (c - 1).bit_length(), _MAX_CHANNELS)
    return max(1, _TILE // channels), channels


def _parts(n: int, r: int, block_rows: int) -> tuple[int, int]:
    """(programs a picture, rows of each): enough programs to fill a GPU, few partial sums."""
    programs = max(1, min(-(-r // block_rows), 2048 // n))
    per = -(-r // programs)
    per = -(-per // block_rows) * block_rows
    return -(-r // per), per


def channel_sums(x: Tensor, n: int, r: int, c: int) -> tuple[Tensor, Tensor]:
    """Sums and sums of squares over the rows of x (memory [n, r, c]), float32 [n, c]."""
    block_rows, block_c = _tile(c)
    parts, per = _parts(n, r, block_rows)
    out = torch.empty(2, n, parts, c, device=x.device)
    grid = (parts, n, -(-c // block_c))
    _kernels()["sums"][grid](x, out, out[1], r, c, per, BLOCK_R=block_rows, BLOCK_C=block_c)
    return out.sum(2).unbind(0)


def gradient_sums(
    x: Tensor, grad: Tensor, factor: Tensor, constant: Tensor, n: int, r: int, c: int, silu: bool
) -> tuple[Tensor, Tensor]:
    """Sums over the rows of dv and of dv x, float32 [n, c]."""
    block_rows, block_c = _tile(c)
    parts, per = _parts(n, r, block_rows)
    out = torch.empty(2, n, parts, c, device=x.device)
    grid = (parts, n, -(-c // block_c))
    _kernels()["gradient_sums"][grid](
        x, grad, factor, constant, out, out[1], r, c, per, SILU=silu, BLOCK_R=block_rows, BLOCK_C=block_c
    )
    return out.sum(2).unbind(0)


def _launch_rows(name: str, n: int, r: int, c: int, *arguments) -> None:
    """Run an elementwise kernel; its last argument is whether there is a silu."""
    *tensors, silu = arguments
    block_rows, block_c = _tile(c)
    per = block_rows * 4
    grid = (-(-r // per), n, -(-c // block_c))
    _kernels()[name][grid](*tensors, r, c, SILU=silu, STEPS=4, BLOCK_R=block_rows, BLOCK_C=block_c)


def add_residual(x: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
    """Return x + h + bias, bias [C] on the channels of x [N, C, ...] (no gradient); one pass over memory."""
    if bias is None:
        return x + h
    if _runs_on(x) and _rows_of(x) is not None and _rows_of(h) is not None:
        return _AddResidual.apply(x, h, bias)
    return x + (h + bias.reshape(-1, *[1] * (x.ndim - 2)))


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


@functools.cache
def _kernels() -> dict:
    """Define the kernels on first use: importing this file needs no Triton."""
    global tl, triton
    import triton
    import triton.language as tl

    @triton.jit
    def sums(x, out_sum, out_square, r, c, per, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
        part, n = tl.program_id(0), tl.program_id(1)
        channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_C,), tl.float32)
        square = tl.zeros((BLOCK_C,), tl.float32)
        first = n.to(tl.int64) * r * c
        for start in range(0, per, BLOCK_R):
            row = part * per + start + tl.arange(0, BLOCK_R)
            at = first + row[:, None].to(tl.int64) * c + channel[None]
            value = tl.load(x + at, mask=(row[:, None] < r) & (channel[None] < c), other=0.0).to(tl.float32)
            total += tl.sum(value, 0)
            square += tl.sum(value * value, 0)
        to = (n * tl.num_programs(0) + part) * c + channel
        tl.store(out_sum + to, total, mask=channel < c)
        tl.store(out_square + to, square, mask=channel < c)

    @triton.jit
    def gradient_sums(
        x, grad, factor, constant, out_sum, out_product, r, c, per,
        SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        part, n = tl.program_id(0), tl.program_id(1)
        channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_C,), tl.float32)
        product = tl.zeros((BLOCK_C,), tl.float32)
        a = tl.load(factor + n * c + channel, mask=channel < c, other=0.0)
        b = tl.load(constant + n * c + channel, mask=channel < c, other=0.0)
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
            total += tl.sum(dv, 0)
            product += tl.sum(dv * value, 0)
        to = (n * tl.num_programs(0) + part) * c + channel
        tl.store(out_sum + to, total, mask=channel < c)
        tl.store(out_product + to, product, mask=channel < c)

    @triton.jit
    def apply(
        x, factor, constant, out, r, c,
        SILU: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(1)
        channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
        a = tl.load(factor + n * c + channel, mask=channel < c, other=0.0)
        b = tl.load(constant + n * c + channel, mask=channel < c, other=0.0)
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
        x, grad, factor, constant, slope, constant2, out, r, c,
        SILU: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(1)
        channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
        a = tl.load(factor + n * c + channel, mask=channel < c, other=0.0)
        b = tl.load(constant + n * c + channel, mask=channel < c, other=0.0)
        p = tl.load(slope + n * c + channel, mask=channel < c, other=0.0)
        q = tl.load(constant2 + n * c + channel, mask=channel < c, other=0.0)
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
    def residual(x, h, bias, out, n, c, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < n
        value = tl.load(x + at, mask=mask).to(tl.float32) + tl.load(h + at, mask=mask).to(tl.float32)
        value += tl.load(bias + (at % c).to(tl.int32), mask=mask).to(tl.float32)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)

    return {f.fn.__name__: f for f in (sums, gradient_sums, apply, gradient, residual)}
