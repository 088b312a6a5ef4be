"""Where on the rays the scene is looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rays import RayBundle, RaySamples
from ..scene import Scene
from ..transfers import Fetched, fetch


def points_of(rays: RayBundle, samples: RaySamples) -> tuple[Tensor, Tensor]:
    """Return the points [S, 3] in the middles of the samples, and their times [S]."""
    ray = samples.ray_indices
    origins, directions = rays.origins.index_select(0, ray), rays.directions.index_select(0, ray)
    return origins + samples.middles[:, None] * directions, rays.times.index_select(0, ray)


def sample_rays(
    scene: Scene, rays: RayBundle, n_samples: int | None = None, jitter: Tensor | None = None, skip_empty: bool = True
) -> RaySamples:
    """Put samples on the rays, inside the box and (`skip_empty`) in occupied cells.

    Args:
        n_samples: what fixes the step, None for the scene's own. jitter: [N] in [0, 1), moves a ray's lattice.
    """
    columns = scene.kernels.march_rays(*_where_to_march(scene, rays, n_samples, jitter, skip_empty))
    return RaySamples(*columns, len(rays.origins))


def _where_to_march(scene: Scene, rays: RayBundle, n_samples: int | None, jitter: Tensor | None, skip_empty: bool):
    """What the marching kernels are told of a scene and its rays."""
    config, occupied = scene.config, scene.occupancy.occupied if skip_empty else None
    return rays.origins, rays.directions, config.radius, config.step_size(n_samples), occupied, jitter


@torch.no_grad()
def cull_invisible(
    scene: Scene, rays: RayBundle, samples: RaySamples, alpha_threshold: float, samples_at_once: int
) -> RaySamples:
    """Keep the samples whose opacity reaches `alpha_threshold`, from a first look at their density without gradient."""
    return samples.select(_first_look(scene, rays, samples, alpha_threshold, samples_at_once))


def _first_look(
    scene: Scene, rays: RayBundle, samples: RaySamples, alpha_threshold: float, samples_at_once: int
) -> Tensor:
    """[S] bool: which samples reach the opacity; so many at once."""
    pieces = samples.split(samples_at_once)
    return torch.cat([is_visible(scene.density(*points_of(rays, p)), p, alpha_threshold) for p in pieces])


def is_visible(density: Tensor, samples: RaySamples, alpha_threshold: float) -> Tensor:
    """[S] bool: is a sample's opacity 1 - exp(-density dt) at least `alpha_threshold`?"""
    # expm1: near 0 the difference from 1 would have few digits left
    return -torch.expm1(-density * (samples.t_ends - samples.t_starts)) >= alpha_threshold


@dataclass(frozen=True)
class PrefetchedSamples:
    """Samples that were looked for before anyone needs them, so that nobody has to wait for their number."""

    samples: RaySamples  # [capacity]; those after the ones that were found are of length 0
    visible: Tensor  # [capacity] bool, which to keep
    counts: Fetched  # how many intervals there are on the rays, and how many of the samples are visible

    def take(self) -> tuple[RaySamples | None, int]:
        """Return the visible samples (None: they were more than fit) and the number of intervals (-1: unknown)."""
        n_found, n_visible = map(int, self.counts.read())
        fits = 0 <= n_found <= len(self.visible)
        return self.samples.select(self.visible, n_visible) if fits else None, n_found


@torch.no_grad()
def prefetch_visible(
    scene: Scene,
    rays: RayBundle,
    n_samples: int | None,
    jitter: Tensor | None,
    alpha_threshold: float,
    samples_at_once: int,
    capacity: int,
) -> PrefetchedSamples:
    """Do what `sample_rays` and `cull_invisible` do with `capacity` for the samples, and without waiting for a GPU."""
    where = _where_to_march(scene, rays, n_samples, jitter, True)
    ray_indices, t_starts, t_ends, n_found = scene.kernels.march_into(*where, capacity)
    samples = RaySamples(ray_indices, t_starts, t_ends, len(rays.origins))
    visible = _first_look(scene, rays, samples, alpha_threshold, samples_at_once)
    return PrefetchedSamples(samples, visible, fetch(torch.stack((n_found, visible.sum()))))
