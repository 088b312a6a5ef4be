"""What a backend launches for `fused_norm`, and what the backends have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

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
