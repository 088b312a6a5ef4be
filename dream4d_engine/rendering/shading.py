"""Rendered quantities as pictures for people: all return [..., 3] in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from .render import RenderOutput

KINDS = ("rgb", "depth", "normals", "opacity", "displacement")


def depth_picture(depth: Tensor, opacity: Tensor) -> Tensor:
    """Grey by distance, near bright, over black; depth (sum w t) and opacity [..., 1].

    The range is that of all the pictures given together, so a video does not flicker.
    """
    solid = opacity[..., 0] > 0.5
    if not solid.any():
        return torch.zeros_like(depth).expand(*depth.shape[:-1], 3).clone()
    distance = depth / opacity.clamp_min(1e-6)
    near, far = distance[solid].min(), distance[solid].max()
    bright = 1 - 0.8 * (distance - near) / (far - near).clamp_min(1e-6)
    return (bright.clamp(0, 1) * opacity.clamp(0, 1)).expand(*depth.shape[:-1], 3).clone()


def normal_picture(normals: Tensor, opacity: Tensor) -> Tensor:
    """World normals (sums along rays) [..., 3] as colours (n + 1) / 2 over black."""
    unit = torch.nn.functional.normalize(normals, dim=-1, eps=1e-6)
    return ((unit + 1) / 2 * opacity).clamp(0, 1)


def opacity_picture(opacity: Tensor) -> Tensor:
    """Opacity [..., 1] as grey."""
    return opacity.clamp(0, 1).expand(*opacity.shape[:-1], 3).clone()


def displacement_picture(displacement: Tensor, largest: float | None = None) -> Tensor:
    """Displacements [..., 3] as colours around mid grey; `largest` maps to full colour (None: the largest there is)."""
    if largest is None:
        largest = float(displacement.abs().max()) if displacement.numel() else 0.0
    return (0.5 + 0.5 * displacement / max(largest, 1e-6)).clamp(0, 1)


def picture(output: RenderOutput, kind: str) -> Tensor:
    """Return one of `KINDS` of a rendering as pictures [B, F, H, W, 3]."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of picture {kind!r}: choose one of {', '.join(KINDS)}")
    if kind == "rgb":
        return output.rgb.clamp(0, 1)
    if kind == "depth":
        return depth_picture(output.depth, output.opacity)
    if kind == "opacity":
        return opacity_picture(output.opacity)
    value = getattr(output, kind)
    if value is None:
        raise ValueError(f"the rendering holds no {kind}: ask for it in RenderOptions (a static scene never moves)")
    return normal_picture(value, output.opacity) if kind == "normals" else displacement_picture(value)
