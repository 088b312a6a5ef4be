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
import math
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from ...kernels import triton_kernels

_MAX_CHANNELS = 2048  # of one program
_TILE = 4096  # elements that a program holds at once, rows times channels


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
    if _fits(x):
        return _NormSilu.apply(x, weight, bias, n_groups, eps, silu, offset)
    if offset is not None:
        x = x + offset.reshape(*offset.shape, *[1] * (x.ndim - 2))
    normed = functional.group_norm(x, n_groups, weight, bias, eps)
    return functional.silu(normed) if silu else normed


def _fits(x: Tensor) -> bool:
    """Whether the kernels can take x [N, C, ...]: its memory is [N, R, C] without gaps, on a GPU that has Triton."""
    known = x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16, torch.float32) and x.ndim > 2
    return known and has_triton(x.device) and x.movedim(1, -1).is_contiguous()


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device: it may be there and lack the C compiler that it starts kernels with."""
    try:
        triton_kernels.check(device)
    except (ImportError, RuntimeError):
        return False
    return True


class _NormSilu(torch.autograd.Function):
    """x [N, C, ...] in channels_last; returns the same."""

    @staticmethod
    def forward(ctx, x, weight, bias, n_groups, eps, silu, offset):
        from . import fused_norm_source as source

        (n, c), r = x.shape[:2], math.prod(x.shape[2:])
        partial = _sum_rows(source.sums, n, r, c, x)
        # mean and rstd of each channel's group, and the factor and constant that make v of x
        found = torch.empty(4, n, c, device=x.device)
        # one offset for all images is read with a stride of 0; the kernel wants some tensor where there is none
        shift, stride = (x, 0) if offset is None else (offset, c if len(offset) == n and n > 1 else 0)
        more = (weight, bias, shift, stride, found, eps, offset is not None)
        _finish(source.statistics, n, r, c, n_groups, partial, *more)
        out = torch.empty_like(x)
        _launch_rows(source.apply, n, r, c, x, found, out, silu)
        if x.requires_grad:
            ctx.save_for_backward(x, found, weight)
            ctx.settings = n, r, c, n_groups, silu
        return out

    @staticmethod
    def backward(ctx, grad):
        from . import fused_norm_source as source

        x, found, weight = ctx.saved_tensors
        n, r, c, n_groups, silu = ctx.settings
        if not grad.movedim(1, -1).is_contiguous():
            last = torch.channels_last_3d if grad.ndim == 5 else torch.channels_last
            grad = grad.contiguous(memory_format=last)
        partial = _sum_rows(source.gradient_sums, n, r, c, x, grad, found, silu)
        line = torch.empty(2, n, c, device=x.device)  # dx = a dv + slope x + constant: slope and constant a channel
        _finish(source.gradient_line, n, r, c, n_groups, partial, weight, found, line)
        out = torch.empty_like(x)
        _launch_rows(source.gradient, n, r, c, x, grad, found, line, out, silu)
        return out, None, None, None, None, None, None


def rms_silu(x: Tensor, weight: Tensor | None, eps: float, ahead: int = 0, repeated: bool = False) -> Tensor:
    """Return silu(x / rms(x) * weight), rms over the channels of each place: sqrt(mean(x^2) + eps).

    Args:
        x: [1, C, T, H, W], a video. weight: [C]; None for 1. It gets no gradient.
        ahead: so many frames are put before the first: of zeros, or `repeated`, of what the first became.
    """
    if _fits(x) and len(x) == 1 and x.shape[1] <= _MAX_CHANNELS:
        return _RmsSilu.apply(x, weight, eps, ahead, repeated)
    wide = x.float()
    factor = (wide.square().mean(1, keepdim=True) + eps).rsqrt()
    normed = wide * factor if weight is None else wide * factor * weight.float().reshape(-1, 1, 1, 1)
    y = functional.silu(normed).to(x.dtype)
    if not ahead:
        return y
    first = y[:, :, :1] if repeated else torch.zeros_like(y[:, :, :1])
    return torch.cat((*[first] * ahead, y), 2)


class _RmsSilu(torch.autograd.Function):
    """x [1, C, T, H, W] in channels_last_3d; returns the same, some frames longer. Of the forward pass x is kept."""

    @staticmethod
    def forward(ctx, x, weight, eps, ahead, repeated):
        _, c, t, h, w = x.shape
        out = x.new_empty(1, t + ahead, h, w, c)
        _rms(x.movedim(1, -1), weight, None, out[:, ahead:], eps)
        if ahead:
            out[:, :ahead] = out[:, ahead : ahead + 1] if repeated else 0
        if x.requires_grad:
            ctx.save_for_backward(x, *([] if weight is None else [weight]))
            ctx.settings = eps, ahead, repeated
        return out.movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        (x, *weights), (eps, ahead, repeated) = ctx.saved_tensors, ctx.settings
        weight = weights[0] if weights else None
        rows, given = x.movedim(1, -1), grad.movedim(1, -1).contiguous()
        out = torch.empty_like(rows)
        _rms(rows, weight, given[:, ahead:], out, eps)
        if ahead and repeated:  # what came before the first frame was it, too
            _rms(rows[:, :1], weight, given[:, : ahead + 1].sum(1, keepdim=True), out[:, :1], eps)
        return out.movedim(-1, 1), None, None, None, None


def _rms(x: Tensor, weight: Tensor | None, grad: Tensor | None, out: Tensor, eps: float) -> None:
    """Run the kernel on rows [..., C] without gaps; `grad` None: forward."""
    from . import fused_norm_source as source

    c = x.shape[-1]
    r = x.numel() // c
    block_rows, block_c = _tile(c)
    given = x if grad is None else grad  # the kernel wants some tensor where there is none
    known = x if weight is None else weight
    flags = {"WEIGHTED": weight is not None, "BACKWARD": grad is not None}
    source.rms[(-(-r // block_rows),)](x, known, given, out, r, c, eps, **flags, BLOCK_R=block_rows, BLOCK_C=block_c)


def _tile(c: int) -> tuple[int, int]:
    """(rows, channels) of a program's tile."""
    channels = min(1 << (c - 1).bit_length(), _MAX_CHANNELS)  # a power of two, as Triton wants ranges
    return max(1, _TILE // channels), channels


def _parts(n: int, r: int, block_rows: int) -> tuple[int, int]:
    """(programs an image, rows of each): enough programs to fill a GPU, few partial sums."""
    programs = max(1, min(-(-r // block_rows), 2048 // n))
    per = -(-r // programs)
    per = -(-per // block_rows) * block_rows  # whole tiles, so that only the last program has masked rows
    return -(-r // per), per


def _sum_rows(kernel: Any, n: int, r: int, c: int, *arguments) -> Tensor:
    """Run a kernel that sums two things over rows: [2, n, parts, c] partial sums, float32."""
    tensors, silu = ([*arguments[:-1]], {"SILU": arguments[-1]}) if len(arguments) > 1 else (arguments, {})
    block_rows, block_c = _tile(c)
    parts, per = _parts(n, r, block_rows)
    out = torch.empty(2, n, parts, c, device=arguments[0].device)
    grid = (parts, n, -(-c // block_c))
    kernel[grid](*tensors, out, n, r, c, per, BLOCK_R=block_rows, BLOCK_C=block_c, **silu)
    return out


def _finish(kernel: Any, n: int, r: int, c: int, n_groups: int, partial: Tensor, *arguments) -> None:
    """Run a kernel that makes per-channel numbers of partial sums, one program a group of an image."""
    width, parts = c // n_groups, partial.shape[2]
    block_c = 1 << (width - 1).bit_length()
    block_p = min(1 << (parts - 1).bit_length(), max(1, 2048 // block_c))
    kernel[(n_groups, n)](partial, *arguments, n, r, c, width, parts, BLOCK_P=block_p, BLOCK_C=block_c)


def _launch_rows(kernel: Any, n: int, r: int, c: int, *arguments) -> None:
    """Run an elementwise kernel; its last argument is whether there is a silu."""
    *tensors, silu = arguments
    block_rows, block_c = _tile(c)
    per = block_rows * 4  # STEPS tiles one after the other: fewer programs read the channels' numbers
    grid = (-(-r // per), n, -(-c // block_c))
    kernel[grid](*tensors, n, r, c, SILU=silu, STEPS=4, BLOCK_R=block_rows, BLOCK_C=block_c)


def add_residual(x: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
    """Return x + h + bias, bias [C] on the channels of x [N, C, ...] (no gradient); one pass over memory."""
    if bias is None:
        return x + h
    if _fits(x) and _fits(h):
        return _AddResidual.apply(x, h, bias)
    return x + (h + bias.reshape(-1, *[1] * (x.ndim - 2)))


@torch.no_grad()
def add_bias_(x: Tensor, bias: Tensor | None) -> Tensor:
    """Add bias [C] to the channels of x [N, C, ...] in place and return x; no gradient is captured."""
    if bias is None:
        return x
    if not _fits(x):
        return x.add_(bias.reshape(-1, *[1] * (x.ndim - 2)))
    from . import fused_norm_source as source

    n, c = x.numel(), x.shape[1]
    source.shift[(-(-n // 4096),)](x, bias, n, c, BLOCK=4096)
    return x


class _AddResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, bias):
        from . import fused_norm_source as source

        out = torch.empty_like(x)
        n, c = x.numel(), x.shape[1]
        source.residual[(-(-n // 4096),)](x, h, bias, out, n, c, BLOCK=4096)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, grad, None


def double_size(x: Tensor) -> Tensor:
    """Return x [N, C, H, W] with every place repeated twice along both sides."""
    if (torch.is_grad_enabled() and x.requires_grad) or not _fits(x):
        return functional.interpolate(x, scale_factor=2.0, mode="nearest")
    from . import fused_norm_source as source

    n, c, height, width = x.shape
    out = x.new_empty(n, 2 * height, 2 * width, c).permute(0, 3, 1, 2)
    block = min(1 << (c - 1).bit_length(), 1024)
    source.double[(n * height * width, -(-c // block))](x, out, height, width, c, BLOCK=block, num_warps=2)
    return out
