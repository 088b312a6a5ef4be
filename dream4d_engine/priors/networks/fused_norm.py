"""Group normalisation with SiLU for networks in channels_last, forward and backward, as two passes over memory.

PyTorch's own group norm turns channels_last around and back, which costs more than the convolutions gain from it.
Here an image is R rows of C channels; one kernel sums rows per channel, a small one makes a factor and a constant
for each channel of that, one applies them. With g the group of channel c, mean and rstd those of (image, group):

    v = a x + b,  a = rstd_g w_c,  b = bias_c + (offset_c - mean_g) a,  y = silu(v)
    dx = a dv - rstd_g (c1 + xhat c2),  dv = dy silu'(v),  c1 = mean_g(w dv),  c2 = mean_g(w dv xhat)

Weights get no gradient: they belong to frozen networks. The kernels are Triton's, else those that NVRTC compiles; the
plain PyTorch twin is used where neither is.
"""

from __future__ import annotations

import functools
import logging
from importlib import import_module

import torch
import torch.nn.functional as functional
from torch import Tensor

from ...kernels import nvrtc_kernels, triton_kernels
from ...kernels.launched import first_line
from ...machine import must_be_able
from .fused_norm_launches import MAX_CHANNELS, Launches, try_out

logger = logging.getLogger(__name__)

_MAX_IMAGES = 2**16  # a GPU's limit for blocks beside each other


@functools.cache
def launches_on(device: torch.device) -> Launches | None:
    """The kernels of a device, tried out once; None where none run. The log says which don't, and why."""
    reasons = []
    for name, kernels in (("triton", triton_kernels), ("nvrtc", nvrtc_kernels)):
        try:
            kernels.check(device)
            launches = import_module(f".fused_norm_{name}", __package__).LAUNCHES
            try_out(launches, device)
        except Exception as error:  # whatever a compiler may raise
            must_be_able(error, "the models' norms")
            reasons.append(f"{name}: {first_line(error)}")
            continue
        if reasons:
            logger.info("the models' norms are %s's; %s", name, reasons[0])
        return launches
    if device.type == "cuda":
        logger.warning("the models' norms run in plain PyTorch, slower and with more memory; %s", "; ".join(reasons))
    return None


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device: it may be there and lack the C compiler that it starts kernels with."""
    try:
        triton_kernels.check(device)
    except (ImportError, RuntimeError) as error:
        must_be_able(error, "Triton's kernels")
        return False
    return True


def _launches(*tensors: Tensor) -> Launches | None:
    """The kernels that can take tensors [N, C, ...], whose memory has to be [N, R, C] without gaps; None: there are
    none."""
    known = all(x.dtype in nvrtc_kernels.NUMBERS and x.ndim > 2 and x.movedim(1, -1).is_contiguous() for x in tensors)
    known = known and len(tensors[0]) < _MAX_IMAGES and tensors[0].numel() > 0
    return launches_on(tensors[0].device) if known else None


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
    if launches := _launches(x):
        return _NormSilu.apply(launches, x, weight, bias, offset, (n_groups, eps, silu))[0]
    if offset is not None:
        x = x + offset.reshape(*offset.shape, *[1] * (x.ndim - 2))
    normed = functional.group_norm(x, n_groups, weight, bias, eps)
    return functional.silu(normed) if silu else normed


def norm_silu_beside(x: Tensor, weight: Tensor, bias: Tensor, n_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return silu(group_norm(x)) and x, for what goes around it: the gradients on both are added up in one pass."""
    if launches := _launches(x):
        return _NormSilu.apply(launches, x, weight, bias, None, (n_groups, eps, True))
    return norm_silu(x, weight, bias, n_groups, eps), x


class _NormSilu(torch.autograd.Function):
    """x [N, C, ...] in channels_last; returns the same, and x. `settings`: number of groups, eps, silu."""

    @staticmethod
    def forward(ctx, launches, x, weight, bias, offset, settings):
        out, found = launches.norm(x, weight, bias, offset, *settings)
        if x.requires_grad:
            ctx.save_for_backward(x, found, weight)
            ctx.launches, ctx.settings = launches, settings
        ctx.set_materialize_grads(False)
        return out, x

    @staticmethod
    def backward(ctx, grad, around):
        if grad is None:  # nobody asked for what was normed
            return None, around, None, None, None, None
        x, found, weight = ctx.saved_tensors
        n_groups, _, silu = ctx.settings
        more = None if around is None else _channels_last(around)
        out = ctx.launches.norm_back(x, _channels_last(grad), found, weight, n_groups, silu, more)
        return None, out, None, None, None, None


def _channels_last(x: Tensor) -> Tensor:
    """x [N, C, ...] with its memory as [N, ..., C], copied where it isn't."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def rms_silu(x: Tensor, weight: Tensor | None, eps: float, ahead: int = 0, repeated: bool = False) -> Tensor:
    """Return silu(x / rms(x) * weight), rms over the channels of each place: sqrt(mean(x^2) + eps).

    Args:
        x: [1, C, T, H, W], a video. weight: [C]; None for 1. It gets no gradient.
        ahead: so many frames are put before the first: of zeros, or `repeated`, of what the first became.
    """
    launches = _launches(x)
    if launches and len(x) == 1 and x.shape[1] <= MAX_CHANNELS:
        return _RmsSilu.apply(launches, x, weight, eps, ahead, repeated)
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
    def forward(ctx, launches, x, weight, eps, ahead, repeated):
        _, c, t, h, w = x.shape
        out = x.new_empty(1, t + ahead, h, w, c)
        launches.rms(x.movedim(1, -1), weight, None, out[:, ahead:], eps)
        if ahead:
            out[:, :ahead] = out[:, ahead : ahead + 1] if repeated else 0
        if x.requires_grad:
            ctx.save_for_backward(x, *([] if weight is None else [weight]))
            ctx.settings = launches, eps, ahead, repeated
        return out.movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        (x, *weights), (launches, eps, ahead, repeated) = ctx.saved_tensors, ctx.settings
        weight = weights[0] if weights else None
        rows, given = x.movedim(1, -1), grad.movedim(1, -1).contiguous()
        out = torch.empty_like(rows)
        launches.rms(rows, weight, given[:, ahead:], out, eps)
        if ahead and repeated:  # what came before the first frame was it, too
            launches.rms(rows[:, :1], weight, given[:, : ahead + 1].sum(1, keepdim=True), out[:, :1], eps)
        return None, out.movedim(-1, 1), None, None, None, None


def add_residual(x: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
    """Return x + h + bias, bias [C] on the channels of x [N, C, ...] (no gradient); one pass over memory."""
    if bias is None:
        return x + h
    if launches := _launches(x, h):
        return _AddResidual.apply(launches, x, h, bias)
    return x + (h + bias.reshape(-1, *[1] * (x.ndim - 2)))


class _AddResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, launches, x, h, bias):
        out = torch.empty_like(x)
        launches.add(x, h, bias, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return None, grad, grad, None


@torch.no_grad()
def add_bias_(x: Tensor, bias: Tensor | None) -> Tensor:
    """Add bias [C] to the channels of x [N, C, ...] in place and return x; no gradient is captured."""
    if bias is None:
        return x
    if launches := _launches(x):
        launches.shift(x, bias)
        return x
    return x.add_(bias.reshape(-1, *[1] * (x.ndim - 2)))


def double_size(x: Tensor) -> Tensor:
    """Return x [N, C, H, W] with every place repeated twice along both sides."""
    launches = None if torch.is_grad_enabled() and x.requires_grad else _launches(x)
    if launches is None:
        return functional.interpolate(x, scale_factor=2.0, mode="nearest")
    n, c, height, width = x.shape
    out = x.new_empty(n, 2 * height, 2 * width, c).permute(0, 3, 1, 2)
    launches.double(x, out)
    return out


def gated(x: Tensor) -> Tensor:
    """Return the first half of x [N, L, 2 C] times gelu of the second."""
    with_gradient = torch.is_grad_enabled() and x.requires_grad
    known = not with_gradient and x.dtype in nvrtc_kernels.NUMBERS and x.is_contiguous() and x.numel() > 0
    launches = launches_on(x.device) if known else None
    if launches is None or launches.gate is None:
        value, gate = x.chunk(2, -1)
        return value * functional.gelu(gate)
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    launches.gate(x, out)
    return out
