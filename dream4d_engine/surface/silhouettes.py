"""Which density is the surface: the one whose outlines are those that the renderer shows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cameras import CameraBatch, film_times, make_cameras
from ..mesh import MeshError
from ..rays import rays_from_cameras
from ..rendering import render_chunked
from ..rendering.march import points_of, sample_rays
from ..scene import Scene
from .look import require_finite

N_VIEWS, IMAGE_SIZE = 8, 72
_FINE = 256  # samples along a ray, at least, among which its densest one is looked for
_SOLID = 0.5  # opacity from which on a pixel shows the object


def silhouette_cameras(scene: Scene, time: float | None, size: int = IMAGE_SIZE, n_views: int = N_VIEWS) -> CameraBatch:
    """Cameras [1, n_views] all around and from above and below; `time` None: over all moments."""
    views = torch.arange(n_views)
    elevation = torch.tensor([15.0, -20.0, 45.0])[views % 3]
    times = film_times(n_views, scene.loops) if time is None else torch.full((n_views,), time)
    return make_cameras(
        (views * (2 * math.pi / n_views))[None],
        torch.deg2rad(elevation)[None],
        3.0 * scene.config.radius,
        math.radians(40.0),
        times[None],
        size,
        size,
    )


@torch.no_grad()
def find_threshold(scene: Scene, time: float | None) -> tuple[float, float]:
    """Return the density of the surface whose silhouettes agree best with opacity > 0.5, and their IoU.

    A surface at density d covers a pixel exactly where the densest point of its ray has at least d. So rays sorted by
    that give the IoU of every threshold at once.
    """
    cameras = silhouette_cameras(scene, time)
    solid = (require_finite(render_chunked(scene, cameras).opacity) > _SOLID).reshape(-1)
    if not bool(solid.any()):
        raise MeshError("the scene is empty: from nowhere is there anything to see that a surface could be put on")
    if float(solid.float().mean()) > 0.95:
        raise MeshError("the scene's field fills its box: it has no surface inside; train it anew, or for longer")
    densest, order = _densest(scene, cameras).cpu().sort(descending=True)
    shown = solid[order].float()
    shared = shown.cumsum(0)
    union = torch.arange(1, len(shown) + 1) + shown.sum() - shared
    iou = shared / union
    best = int(iou.argmax())
    return max(float(densest[best]), 1e-3), float(iou[best])


def _densest(scene: Scene, cameras: CameraBatch) -> Tensor:
    """Return the greatest density [N] on each ray."""
    rays, n_samples = rays_from_cameras(cameras.to(scene.device)), max(_FINE, scene.config.n_samples)
    samples = sample_rays(scene, rays, n_samples)
    densest = torch.zeros(len(rays.origins), device=scene.device)
    for piece in samples.split(2**18):
        density = require_finite(scene.density(*points_of(rays, piece)).float())
        densest.scatter_reduce_(0, piece.ray_indices, density, "amax")
    return densest
