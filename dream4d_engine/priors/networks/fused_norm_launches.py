"""What a backend launches for `fused_norm`, and what the backends have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from ...kernels.launched import unobserved

MAX_CHANNELS = 2048
"""Of a row that is held at once."""


@dataclass(frozen=True)
class Launches:
    """The launches of a backend. Tensors [N, C, ...] are in channels_last; weights and biases are [C]."""

    name: str
    norm: Callable[..., tuple[Tensor, Tensor]]  # x, weight, bias, offset, groups, eps, silu -> y, `found` [4, N, C]
    norm_back: Callable[..., Tensor]  # x, grad, found, weight, groups, silu, more or None -> the gradient on x, + more
    rms: Callable[..., None]  # x [..., C], weight, grad, to out, eps; without grad: forward
    shift: Callable[[Tensor, Tensor], None]  # to x: bias is added
    add: Callable[[Tensor, Tensor, Tensor, Tensor], None]  # x, h, bias, to out
    double: Callable[[Tensor, Tensor], None]  # x [N, C, H, W], to out
    gate: Callable[[Tensor, Tensor], None] | None = None  # x [..., 2 C], to out [..., C]; None: there is none


def sizes(x: Tensor) -> tuple[int, int, int]:
    """(images, rows, channels) of x [N, C, ...]."""
    n, c = x.shape[:2]
    return n, math.prod(x.shape[2:]), c


def offset_stride(offset: Tensor | None, n: int) -> int:
    """How far the images' offsets are apart; one offset [1, C] for all is read again and again."""
    return 0 if offset is None or len(offset) == 1 or n == 1 else offset.shape[1]


def parts_of(n: int, r: int, tile_rows: int) -> tuple[int, int]:
    """(programs an image, rows of each): enough programs to fill a GPU, few partial sums."""
    programs = max(1, min(-(-r // tile_rows), 2048 // n))
    per = -(-r // programs)
    per = -(-per // tile_rows) * tile_rows  # whole tiles, so that only the last program has masked rows
    return -(-r // per), per


_TOLERANCE = 0.02
"""Of a first try, as a share of the largest number: some times what rounding to half precision leaves."""


def try_out(launches: Launches, device: torch.device) -> None:
    """Raise RuntimeError where a launch on half precision fails, or gives something else than PyTorch."""

    def made(*shape: int) -> Tensor:
        """Of channels last; nothing is drawn, so that no random numbers are used up."""
        numbers = torch.arange(math.prod(shape), device=device).mul(0.37).sin()
        return numbers.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).half()

    plain = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), plain, unobserved():
        x, grad, weight = made(2, 64, 4, 6), made(2, 64, 4, 6).flip(0, 2), 1 + made(64, 1).flatten()
        out, found = launches.norm(x, weight, weight, weight[None], 8, 1e-5, True)
        back = launches.norm_back(x, grad, found, weight, 8, True, grad)
        wide, w = x.float().requires_grad_(), weight.float()
        normed = functional.silu(functional.group_norm(wide + w[:, None, None], 8, w, w, 1e-5))
        (theirs,) = torch.autograd.grad(normed, wide, grad.float())
        pairs = [("norm", out, normed), ("norm, backward", back, theirs + grad.float())]

        rows, along, rms, rms_back = x.movedim(1, -1), grad.movedim(1, -1), *torch.empty(2, 2, 4, 6, 64).to(x).unbind()
        launches.rms(rows, weight, None, rms, 1e-6)
        launches.rms(rows, weight, along, rms_back, 1e-6)
        wide = rows.float().requires_grad_()
        normed = functional.silu(wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w)
        (theirs,) = torch.autograd.grad(normed, wide, along.float())
        pairs += [("RMS norm", rms, normed), ("RMS norm, backward", rms_back, theirs)]

        shifted, added, doubled = x.clone(), torch.empty_like(x), made(2, 64, 8, 12)
        launches.shift(shifted, weight)
        launches.add(x, grad, weight, added)
        launches.double(x, doubled)
        pairs += [("bias", shifted, x + w[:, None, None]), ("residual", added, x + grad + w[:, None, None])]
        pairs += [("doubling", doubled, functional.interpolate(x, scale_factor=2.0))]
        if launches.gate is not None:
            gate = x.new_empty(2, 32)
            launches.gate(x[:, :, 0, 0].contiguous(), gate)
            value, by = x[:, :, 0, 0].float().chunk(2, -1)
            pairs += [("gate", gate, value * functional.gelu(by))]
        for name, ours, exact in pairs:
            error = float(((ours.float() - exact.float()).abs().max() / exact.abs().max()).detach())
            if not error < _TOLERANCE:  # NaN is no agreement either
                raise RuntimeError(f"the {name} differs from PyTorch's by {error:.1e} of its largest number")
