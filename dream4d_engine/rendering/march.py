"""Where on the rays the scene is looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rays import RayBundle, RaySamples
from ..scene import Scene


def points_of(rays: RayBundle, samples: RaySamples) -> tuple[Tensor, Tensor]:
    """Return the points [S, 3] in the middles of the samples, and their times [S]."""
    ray = samples.ray_indices
    origins, directions = rays.origins.index_select(0, ray), rays.directions.index_select(0, ray)
    return origins + samples.middles[:, None] * directions, rays.times.index_select(0, ray)


def sample_rays(
    scene: Scene, rays: RayBundle, n_samples: int | None = None, shift: Tensor | None = None, skip_empty: bool = True
) -> RaySamples:
    """Put samples on the rays, inside the box and (`skip_empty`) in occupied cells.

    Args:
        n_samples: what fixes the step, None for the scene's own. shift: [N] in [0, 1), moves a ray's lattice.
    """
    config = scene.config
    occupied = scene.occupancy.occupied if skip_empty else None
    ray_indices, t_starts, t_ends = scene.kernels.march_rays(
        rays.origins, rays.directions, config.radius, config.step_size(n_samples), occupied, shift
    )
    return RaySamples(ray_indices, t_starts, t_ends, len(rays.origins))


@torch.no_grad()
def drop_transparent(
    scene: Scene, rays: RayBundle, samples: RaySamples, alpha_threshold: float, samples_at_once: int
) -> RaySamples:
    """Keep the samples whose opacity reaches `alpha_threshold`, from a first look at their density without gradient."""
    points, times = points_of(rays, samples)
    parts = zip(points.split(samples_at_once), times.split(samples_at_once), strict=True)
    density = torch.cat([scene.density(p, t) for p, t in parts])
    return samples.select(is_visible(density, samples, alpha_threshold))


def is_visible(density: Tensor, samples: RaySamples, alpha_threshold: float) -> Tensor:
    """[S] bool: is a sample's opacity 1 - exp(-density dt) at least `alpha_threshold`?"""
    return -torch.expm1(-density * (samples.t_ends - samples.t_starts)) >= alpha_threshold
