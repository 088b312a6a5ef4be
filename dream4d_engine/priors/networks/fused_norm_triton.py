"""The launches of the fused norm in Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.launched import on_device, power_of_two
from .fused_norm_launches import MAX_CHANNELS, Launches, offset_stride, parts_of, sizes

_TILE = 4096
"""Elements that a program holds at once, rows times channels."""


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor, offset: Tensor | None, n_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    from . import fused_norm_source as source

    n, r, c = sizes(x)
    partial = _sum_rows(source.sums, n, r, c, x)
    # mean and rstd of each channel's group, and the factor and constant that make v of x
    found = torch.empty(4, n, c, device=x.device)
    shift = x if offset is None else offset  # the kernel wants some tensor where there is none
    more = (weight, bias, shift, offset_stride(offset, n), found, eps, offset is not None)
    _finish(source.statistics, n, r, c, n_groups, partial, *more)
    out = torch.empty_like(x)
    _launch_rows(source.apply, n, r, c, x, found, out, silu)
    return out, found


def _norm_back(
    x: Tensor, grad: Tensor, found: Tensor, weight: Tensor, n_groups: int, silu: bool, more: Tensor | None
) -> Tensor:
    from . import fused_norm_source as source

    n, r, c = sizes(x)
    partial = _sum_rows(source.gradient_sums, n, r, c, x, grad, found, silu)
    line = torch.empty(2, n, c, device=x.device)  # dx = a dv + slope x + constant: slope and constant a channel
    _finish(source.gradient_line, n, r, c, n_groups, partial, weight, found, line)
    out, added = torch.empty_like(x), grad if more is None else more  # the kernel wants some tensor where there is none
    _launch_rows(source.gradient, n, r, c, x, grad, found, line, added, out, silu, MORE=more is not None)
    return out


def _rms(x: Tensor, weight: Tensor | None, grad: Tensor | None, out: Tensor, eps: float) -> None:
    from . import fused_norm_source as source

    c = x.shape[-1]
    r = x.numel() // c
    block_rows, block_c = _tile(c)
    given = x if grad is None else grad  # the kernel wants some tensor where there is none
    known = x if weight is None else weight
    flags = {"WEIGHTED": weight is not None, "BACKWARD": grad is not None}
    with on_device(x.device):
        source.rms[(-(-r // block_rows),)](
            x, known, given, out, r, c, eps, **flags, BLOCK_R=block_rows, BLOCK_C=block_c
        )


def _shift(x: Tensor, bias: Tensor) -> None:
    from . import fused_norm_source as source

    n, c = x.numel(), x.shape[1]
    with on_device(x.device):
        source.shift[(-(-n // 4096),)](x, bias, n, c, BLOCK=4096)


def _add(x: Tensor, h: Tensor, bias: Tensor, out: Tensor) -> None:
    from . import fused_norm_source as source

    n, c = x.numel(), x.shape[1]
    with on_device(x.device):
        source.residual[(-(-n // 4096),)](x, h, bias, out, n, c, BLOCK=4096)


def _double(x: Tensor, out: Tensor) -> None:
    from . import fused_norm_source as source

    n, c, height, width = x.shape
    block = min(power_of_two(c), 1024)
    with on_device(x.device):
        source.double[(n * height * width, -(-c // block))](x, out, height, width, c, BLOCK=block, num_warps=2)


def _tile(c: int) -> tuple[int, int]:
    """(rows, channels) of a program's tile."""
    channels = min(power_of_two(c), MAX_CHANNELS)  # a power of two, as Triton wants ranges
    return max(1, _TILE // channels), channels


def _sum_rows(kernel: Any, n: int, r: int, c: int, *arguments) -> Tensor:
    """Run a kernel that sums two things over rows: [2, n, parts, c] partial sums, float32."""
    tensors, silu = ([*arguments[:-1]], {"SILU": arguments[-1]}) if len(arguments) > 1 else (arguments, {})
    block_rows, block_c = _tile(c)
    parts, per = parts_of(n, r, block_rows)
    out = torch.empty(2, n, parts, c, device=arguments[0].device)
    grid = (parts, n, -(-c // block_c))
    with on_device(out.device):
        kernel[grid](*tensors, out, n, r, c, per, BLOCK_R=block_rows, BLOCK_C=block_c, **silu)
    return out


def _finish(kernel: Any, n: int, r: int, c: int, n_groups: int, partial: Tensor, *arguments) -> None:
    """Run a kernel that makes per-channel numbers of partial sums, one program a group of an image."""
    width, parts = c // n_groups, partial.shape[2]
    block_c = power_of_two(width)
    block_p = min(power_of_two(parts), max(1, 2048 // block_c))
    with on_device(partial.device):
        kernel[(n_groups, n)](partial, *arguments, n, r, c, width, parts, BLOCK_P=block_p, BLOCK_C=block_c)


def _launch_rows(kernel: Any, n: int, r: int, c: int, *arguments, **flags: bool) -> None:
    """Run an elementwise kernel; its last argument is whether there is a silu."""
    *tensors, silu = arguments
    block_rows, block_c = _tile(c)
    per = block_rows * 4  # STEPS tiles one after the other: fewer programs read the channels' numbers
    grid = (-(-r // per), n, -(-c // block_c))
    with on_device(tensors[0].device):
        kernel[grid](*tensors, n, r, c, SILU=silu, STEPS=4, BLOCK_R=block_rows, BLOCK_C=block_c, **flags)


LAUNCHES = Launches("triton", _norm, _norm_back, _rms, _shift, _add, _double)
