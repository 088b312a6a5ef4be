"""Rendered quantities as images for people: all return [..., 3] in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cameras import CameraBatch
from ..rays import rays_from_cameras
from .render import RenderOutput

KINDS = ("rgb", "depth", "normals", "opacity", "displacement")


def depth_image(depth: Tensor, opacity: Tensor, bounds: tuple[float, float] | None = None) -> Tensor:
    """Grey by distance, near bright, over black; depth (sum w t) and opacity [..., 1].

    `bounds` (near, far) None: the range is that of all the images given together, so a video does not flicker.
    """
    solid = opacity[..., 0] > 0.5
    if not solid.any():
        return torch.zeros_like(depth).expand(*depth.shape[:-1], 3).clone()
    distance = depth / opacity.clamp_min(1e-6)  # the sum w t as a mean
    near, far = bounds or (float(distance[solid].min()), float(distance[solid].max()))
    bright = 1 - 0.8 * (distance - near) / max(far - near, 1e-6)
    return (bright.clamp(0, 1) * opacity.clamp(0, 1)).expand(*depth.shape[:-1], 3).clone()


@torch.no_grad()
def surface_normals(cameras: CameraBatch, output: RenderOutput, smoothing: int = 3) -> Tensor:
    """World normals [B, F, H, W, 3] of the surface that the rendered depth describes, zero where it is transparent.

    Cross products of the differences between neighbouring pixels' points, their depth averaged over `smoothing` x
    `smoothing` pixels. It asks the scene nothing, where RenderOptions.normals asks it six times a sample: for looking,
    not for losses.
    """
    rays = rays_from_cameras(cameras.to(output.depth.device))
    opacity, depth = (value.flatten(0, 1).movedim(-1, 1) for value in (output.opacity, output.depth))

    def blurred(image: Tensor) -> Tensor:
        return F.avg_pool2d(image, smoothing, 1, smoothing // 2, count_include_pad=False)

    distance = blurred(depth) / blurred(opacity).clamp_min(1e-6)
    distance = distance.movedim(1, -1).view(*rays.shape, 1)
    points = rays.origins.view(*rays.shape, 3) + distance * rays.directions.view(*rays.shape, 3)
    right, down = torch.gradient(points, dim=(3, 2))  # along columns and rows
    normals = F.normalize(torch.linalg.cross(down, right), dim=-1, eps=1e-9)  # in this order towards the camera
    return normals * (output.opacity > 0.5)


def normal_image(normals: Tensor, opacity: Tensor) -> Tensor:
    """World normals (sums along rays) [..., 3] as colours (n + 1) / 2 over black."""
    unit = F.normalize(normals, dim=-1, eps=1e-6)
    return ((unit + 1) / 2 * opacity).clamp(0, 1)


def displacement_image(displacement: Tensor, largest: float | None = None) -> Tensor:
    """Displacements [..., 3] as colours around mid grey; `largest` maps to full colour (None: the largest there is)."""
    if largest is None:
        largest = float(displacement.abs().max()) if displacement.numel() else 0.0
    return (0.5 + 0.5 * displacement / max(largest, 1e-6)).clamp(0, 1)


def image_of(output: RenderOutput, kind: str) -> Tensor:
    """Return one of `KINDS` of a rendering as images [B, F, H, W, 3]."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of image {kind!r}: choose one of {', '.join(KINDS)}")
    if kind == "rgb":
        return output.rgb.clamp(0, 1)
    if kind == "depth":
        return depth_image(output.depth, output.opacity)
    if kind == "opacity":
        return output.opacity.clamp(0, 1).expand(*output.opacity.shape[:-1], 3).clone()  # as grey
    value = getattr(output, kind)
    if value is None:
        raise ValueError(f"the rendering holds no {kind}: ask for it in RenderOptions (a static scene never moves)")
    return normal_image(value, output.opacity) if kind == "normals" else displacement_image(value)
