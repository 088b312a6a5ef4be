"""A mask that freezes what lies behind it, seen from the front."""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from ..cameras import look_at_origin
from .encodings import require_range

SIDE = 64
"""Of the mask as it is kept."""
_LEAST_ASPECT, _MOST_ASPECT = 0.05, 20.0
ELEVATION_DEG, DISTANCE, FOV_Y_DEG = 15.0, 3.0, 40.0
"""Of the camera that a mask is painted over: at azimuth 0, as fixed views are rendered where nothing else is said."""


@dataclass(frozen=True)
class Stencil:
    """How far what is behind each part of a front view keeps still, white at the most; see `stencil`."""

    pixels: str  # [SIDE, SIDE] bytes in base64, the border in them
    aspect: float = 1.0  # width over height of the view
    border: float = 0.3  # world units at the origin; said for people

    def __post_init__(self) -> None:
        require_range("a mask's width over its height", self.aspect, _LEAST_ASPECT, _MOST_ASPECT)
        require_range("border", self.border, 0.001, 1e3)
        try:
            n = len(base64.b64decode(self.pixels, validate=True))
        except (binascii.Error, ValueError) as error:
            raise ValueError("a mask's pixels are no base64") from error
        if n != SIDE**2:
            raise ValueError(f"a mask has {n} pixels, expected {SIDE**2}")

    def moves(self, points: Tensor) -> Tensor:
        """[S, 3] -> the share [S] of its way that each goes: 0 behind white, 1 beyond the border."""
        where = _seen_at(points, self.aspect)
        image = _unpacked(self.pixels).to(points)
        white = functional.grid_sample(image[None, None], where[None, None], align_corners=False)
        return 1 - white[0, 0, 0].to(points)


def smooth_step(x: Tensor) -> Tensor:
    """From 0 at 0 to 1 at 1, level at both."""
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def stencil(mask: Tensor, border: float = 0.3) -> Stencil:
    """Freeze what is behind the white of a mask [H, W] in [0, 1]; the motion sets in over `border` beside it."""
    if mask.ndim != 2 or not mask.numel():
        raise ValueError(f"a mask has the shape [height, width], got {list(mask.shape)}")
    if not bool(mask.isfinite().all()):
        raise ValueError("the mask has pixels that are no finite numbers")
    height, width = mask.shape
    if not _LEAST_ASPECT <= width / height <= _MOST_ASPECT:
        raise ValueError(
            f"a mask of {width}x{height} pixels is no front view: its width over its height must lie in "
            f"[{_LEAST_ASPECT}, {_MOST_ASPECT}], so paint it over the fixed view"
        )
    small = functional.interpolate(mask[None, None].float().cpu(), (SIDE, SIDE), mode="area")[0, 0]
    if not bool((small > 0.5).any()):
        raise ValueError("the mask is black: paint white what is to keep still, or leave it away")
    ticks = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    aspect = width / height
    places = torch.stack(torch.meshgrid(ticks, ticks * aspect, indexing="ij"), -1).view(-1, 2)
    apart = torch.cdist(places, places[(small > 0.5).view(-1)]).amin(1)
    world = apart * (DISTANCE * math.tan(math.radians(FOV_Y_DEG) / 2))  # half of the view's height, at the origin
    white = 1 - smooth_step((world / border).view(SIDE, SIDE))
    data = (white * 255).round().to(torch.uint8).numpy().tobytes()
    return Stencil(base64.b64encode(data).decode(), aspect, border)


@lru_cache(maxsize=8)
def _unpacked(pixels: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(pixels)), dtype=torch.uint8).view(SIDE, SIDE) / 255


def _seen_at(points: Tensor, aspect: float) -> Tensor:
    """Where the front camera sees points [S, 3]: [S, 2], right and down, from -1 to 1."""
    angles = torch.zeros(()), torch.tensor(math.radians(ELEVATION_DEG)), torch.tensor(DISTANCE)
    c2w = look_at_origin(*angles).to(points)
    local = ((points - c2w[:3, 3])[:, :, None] * c2w[:3, :3]).sum(1)  # a sum: products may be in half precision
    ahead = (-local[:, 2]).clamp_min(1e-3) * math.tan(math.radians(FOV_Y_DEG) / 2)
    return torch.stack((local[:, 0] / (ahead * aspect), -local[:, 1] / ahead), -1)
