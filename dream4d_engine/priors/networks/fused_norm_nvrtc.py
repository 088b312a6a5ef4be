"""The launches of the fused norm in CUDA C++, compiled on first use by NVRTC, for where Triton is not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...kernels.launched import power_of_two
from ...kernels.nvrtc import Kernel
from ...kernels.nvrtc_kernels import NUMBERS, compile_for
from . import fused_norm_cuda as source
from .fused_norm_launches import Launches, offset_stride, parts_of, sizes

_THREADS = 256
"""Of a block, at most."""
_STEPS = 4
"""Rows that a thread works on: what belongs to their channels is read once."""
_OF_A_ROW = 32
"""Threads that an RMS norm has for a row, at most."""


@dataclass(frozen=True)
class _Tile:
    """How the threads of a block share rows of c channels."""

    pack: int  # channels of a thread
    lanes: int  # threads of a row
    tiles: int  # blocks beside each other that a row takes
    rows: int  # beside each other in a block

    @property
    def threads(self) -> int:
        return self.lanes * self.rows

    def blocks(self, r: int) -> int:
        """So many for r rows, where each thread has several."""
        return -(-r // (self.rows * _STEPS))


def _tile(c: int, *tensors: Tensor) -> _Tile:
    """For tensors of rows of c channels, all of one type: as many numbers together as their places in memory allow."""
    size = tensors[0].element_size()
    pack = math.gcd(c, 16 // size)
    while any(tensor.data_ptr() % (pack * size) for tensor in tensors):
        pack //= 2
    packs = c // pack
    tiles = -(-packs // _THREADS)
    lanes = -(-packs // tiles)
    return _Tile(pack, lanes, tiles, _THREADS // lanes)


@lru_cache(maxsize=512)
def _compiled(device: torch.device, code: str, names: tuple[str, ...], **defined: object) -> tuple[Kernel, ...]:
    # every layer of every step asks: without writing the code anew
    return compile_for(device, code, names, THREADS=_THREADS, **defined)


# ---- group norm ----------------------------------------------------------------------------------------------------


def _norm_kernels(x: Tensor, tile: _Tile, silu: bool) -> tuple[Kernel, ...]:
    names = ("sums", "apply", "gradient_sums", "gradient", "gradient_and_more")
    return _compiled(
        x.device, source.NORM, names, NUMBER=NUMBERS[x.dtype], PACK=tile.pack, SILU=int(silu), STEPS=_STEPS
    )


def _statistics_kernels(weight: Tensor, offset: Tensor) -> tuple[Kernel, ...]:
    kinds = {"WEIGHT": NUMBERS[weight.dtype], "OFFSET": NUMBERS[offset.dtype]}
    return _compiled(weight.device, source.STATISTICS, ("statistics", "gradient_line"), **kinds)


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor, offset: Tensor | None, n_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x)
    (n, r, c), tile = sizes(x), _tile(x.shape[1], x, out)
    sums, apply, *_ = _norm_kernels(x, tile, silu)
    parts, per = parts_of(n, r, tile.rows)
    partial = torch.empty(2, n, parts, c, device=x.device)
    sums((parts, n, tile.tiles), tile.threads, x, partial, n, r, c, per, tile.lanes)
    # mean and rstd of each channel's group, and the factor and constant that make v of x
    found = torch.empty(4, n, c, device=x.device)
    shift = weight if offset is None else offset  # the kernel wants some tensor where there is none
    known = (n, r, c, c // n_groups, parts, offset_stride(offset, n), offset is not None, float(eps))
    statistics, _ = _statistics_kernels(weight, shift)
    statistics((n_groups, n), _THREADS, partial, weight, bias.to(weight.dtype), shift, found, *known)
    apply((tile.blocks(r), n, tile.tiles), tile.threads, x, found, out, n, r, c, tile.lanes)
    return out, found


def _norm_back(
    x: Tensor, grad: Tensor, found: Tensor, weight: Tensor, n_groups: int, silu: bool, more: Tensor | None
) -> Tensor:
    out, added = torch.empty_like(x), grad if more is None else more  # the kernel wants some tensor where there is none
    (n, r, c), tile = sizes(x), _tile(x.shape[1], x, grad, added, out)
    _, _, gradient_sums, alone, and_more = _norm_kernels(x, tile, silu)
    parts, per = parts_of(n, r, tile.rows)
    partial = torch.empty(2, n, parts, c, device=x.device)
    gradient_sums((parts, n, tile.tiles), tile.threads, x, grad, found, partial, n, r, c, per, tile.lanes)
    line = torch.empty(2, n, c, device=x.device)  # dx = a dv + slope x + constant: slope and constant a channel
    _, gradient_line = _statistics_kernels(weight, weight)
    gradient_line((n_groups, n), _THREADS, partial, weight, found, line, n, r, c, c // n_groups, parts)
    known, gradient = (n, r, c, tile.lanes), alone if more is None else and_more
    gradient((tile.blocks(r), n, tile.tiles), tile.threads, x, grad, found, line, added, out, *known)
    return out


# ---- RMS norm ------------------------------------------------------------------------------------------------------


def _rms(x: Tensor, weight: Tensor | None, grad: Tensor | None, out: Tensor, eps: float) -> None:
    c = x.shape[-1]
    r, given, known = x.numel() // c, x if grad is None else grad, x if weight is None else weight
    pack = _tile(c, x, given, out).pack
    packs = c // pack
    lanes = min(_OF_A_ROW, power_of_two(packs))
    (kernel,) = _compiled(
        x.device, source.RMS, ("rms",), NUMBER=NUMBERS[x.dtype], WEIGHT=NUMBERS[known.dtype],
        PACK=pack, LANES=lanes, PER=-(-packs // lanes),
        WEIGHTED=int(weight is not None), BACKWARD=int(grad is not None),
    )  # fmt: skip
    kernel((-(-r * lanes // _THREADS),), _THREADS, x, known, given, out, r, c, float(eps))


# ---- rows ----------------------------------------------------------------------------------------------------------


def _rows_kernels(x: Tensor, weight: Tensor, tile: _Tile) -> tuple[Kernel, ...]:
    names, kinds = ("shifted", "doubled", "gated"), {"NUMBER": NUMBERS[x.dtype], "WEIGHT": NUMBERS[weight.dtype]}
    return _compiled(x.device, source.ROWS, names, PACK=tile.pack, STEPS=_STEPS, **kinds)


def _shift(x: Tensor, bias: Tensor) -> None:
    _add_to(x, None, bias, x)


def _add(x: Tensor, h: Tensor, bias: Tensor, out: Tensor) -> None:
    _add_to(x, h, bias, out)


def _add_to(x: Tensor, h: Tensor | None, bias: Tensor, out: Tensor) -> None:
    c, other = x.shape[1], x if h is None else h.to(x.dtype)
    tile, r = _tile(c, x, other, out), x.numel() // c
    shifted, _, _ = _rows_kernels(x, bias, tile)
    shifted((tile.blocks(r), 1, tile.tiles), tile.threads, x, other, bias, out, r, c, tile.lanes, h is not None)


def _double(x: Tensor, out: Tensor) -> None:
    n, c, height, width = x.shape
    tile = _tile(c, x, out)
    _, doubled, _ = _rows_kernels(x, x, tile)
    doubled((n * height, -(-width // tile.rows), tile.tiles), tile.threads, x, out, width, c, tile.lanes)


def _gate(x: Tensor, out: Tensor) -> None:
    c = out.shape[-1]
    tile, r = _tile(c, x, out), out.numel() // c
    _, _, gated = _rows_kernels(x, x, tile)
    gated((tile.blocks(r), 1, tile.tiles), tile.threads, x, out, r, c, tile.lanes)


LAUNCHES = Launches("nvrtc", _norm, _norm_back, _rms, _shift, _add, _double, _gate)
