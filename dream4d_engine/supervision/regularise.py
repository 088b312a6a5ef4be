"""Supervision that knows no prior and no image: what scenes look like in general."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..randomness import Draw, draw_rows
from ..rays import RayBundle
from ..rendering import RenderOutput, View
from ..scene import Scene
from ..transfers import send
from . import losses
from .record import Supervision, Terms, ViewFunction, needed

SURFACE_OFFSET = 0.01
"""Standard deviation, in radii, of how far aside the 3D smoothness of normals looks (Magic3D 2211.10440)."""

RIGIDITY_OFFSET = 0.08
"""Likewise, how far the neighbours are to which a point of the object keeps its distance."""


@dataclass(frozen=True)
class RegularizerWeights:
    """Weights of the terms that know no prior; 0 leaves a term out. See losses.py."""

    opacity: float = 0.0  # prefers empty space
    entropy: float = 0.0  # opacities of 0 or 1
    orientation: float = 0.0  # surfaces that face the camera
    z_variance: float = 0.0  # thin surfaces
    normal_smoothness_2d: float = 0.0  # normals that change little from pixel to pixel
    normal_smoothness_3d: float = 0.0  # normals that change little from point to point
    displacement_tv: float = 0.0  # motion that changes little from pixel to pixel and frame to frame
    rigidity: float = 0.0  # motion that keeps the distances between near points of the object


def regularisers(weights_at: Callable[[float], RegularizerWeights], view: ViewFunction) -> Supervision:
    """Return the supervision by the terms whose weights at a progress are not 0; the others are not computed.

    The view must composite the normals, displacements and variances of depth that they look at.
    """

    def loss(scene: Scene, output: RenderOutput, view: View, progress: float, draw: Draw) -> Terms:
        weights = weights_at(progress)
        parts: dict[str, Tensor] = {}
        if weights.opacity:
            parts["opacity"] = weights.opacity * losses.opacity_sparsity(output.opacity)
        if weights.entropy:
            parts["entropy"] = weights.entropy * losses.opacity_entropy(output.opacity)
        if weights.z_variance:
            spread = needed(output.z_variance, "a rendering of the variance of depth")
            parts["z_variance"] = weights.z_variance * losses.z_variance(spread, output.opacity)
        if weights.displacement_tv:
            displacement = needed(output.displacement, "a rendering of displacements")
            parts["displacement_tv"] = weights.displacement_tv * losses.displacement_tv(displacement)
        if weights.normal_smoothness_2d:
            normals = needed(output.normals, "a rendering of normals")
            parts["normal_2d"] = weights.normal_smoothness_2d * losses.normal_smoothness_2d(normals)
        if weights.orientation:
            normals = needed(output.normals, "a rendering of normals").reshape(-1, 3)
            facing = losses.orientation(output.opacity, normals, view.rays.directions.to(normals))
            parts["orientation"] = weights.orientation * facing
        if weights.normal_smoothness_3d:
            aside = draw.groups("aside", view.cameras.shape[0])
            smoothness = _normal_smoothness(scene, output, view.rays, aside)
            # this and the next ask the scene itself, which every process does
            parts["normal_3d"] = weights.normal_smoothness_3d * view.division.once(smoothness)
        if weights.rigidity:
            near = draw.groups("rigidity", view.cameras.shape[0])
            parts["rigidity"] = weights.rigidity * view.division.once(_rigidity(scene, output, view.rays, near))
        return Terms(parts)

    return Supervision("regularisers", view, loss)


def _where_rays_end(
    output: RenderOutput, rays: RayBundle, source: tuple[torch.Generator, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the points [S, 3] where opaque rays end, their times [S], and a normal offset each [S, 3]."""
    opacity = output.opacity.detach().reshape(-1)
    seen = opacity > 0.5  # [N]; the others end nowhere
    distance = (output.depth.detach().reshape(-1) / opacity.clamp_min(1e-6))[seen]
    points = rays.origins[seen] + distance[:, None] * rays.directions[seen]
    aside = send(draw_rows(torch.randn, tuple(rays.origins.shape), source), points.device)  # for all, see randomness
    return points, rays.times[seen], aside[seen]


def _behind(
    scene: Scene, ends: Tensor, output: RenderOutput, rays: RayBundle, source: tuple[torch.Generator, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return points [S, 3] in the solid behind where opaque rays end [R, 3], their times [S], and an offset each.

    So sides that no camera sees are told of, too: their way is through the object.
    """
    seen = output.opacity.detach().reshape(-1) > 0.5
    further = send(draw_rows(torch.rand, (len(rays.origins), 1), source), ends.device)[seen] * scene.config.radius
    aside = send(draw_rows(torch.randn, tuple(rays.origins.shape), source), ends.device)[seen]
    points, times = ends + further * rays.directions[seen], rays.times[seen]
    with torch.no_grad():
        solid = scene.is_solid(scene.density(points, times))
    kept = solid & (points.abs() < scene.config.radius).all(-1)
    return points[kept], times[kept], aside[kept]


def _rigidity(scene: Scene, output: RenderOutput, rays: RayBundle, source: tuple[torch.Generator, ...]) -> Tensor:
    """Compare how far pairs of points of the object lie from each other in the frame and in the field.

    The points are where opaque rays end, and in the solid behind.
    """
    if scene.deformation is None:
        raise ValueError("rigidity is about motion, and the scene has none: leave its weight at 0")
    ends = _where_rays_end(output, rays, source)
    both_kinds = zip(ends, _behind(scene, ends[0], output, rays, source), strict=True)
    points, times, aside = (torch.cat(parts) for parts in both_kinds)
    u = (points / scene.config.radius + 1) / 2  # the warp's own units: shares of the box
    nearby = u + RIGIDITY_OFFSET / 2 * aside
    both = torch.cat((u, nearby)).clamp(0, 1)
    shift = scene.deformation.displacement(both, times.repeat(2), scene.kernels)
    first, second = (both + shift).chunk(2)  # times the scale, by which all distances are smaller in the field
    one, other = both.chunk(2)
    apart = (other - one).norm(dim=-1) > 1e-4  # a pair on the box's border may have become one
    return losses.rigidity((second - first)[apart], (other - one)[apart])


def _normal_smoothness(
    scene: Scene, output: RenderOutput, rays: RayBundle, source: tuple[torch.Generator, ...]
) -> Tensor:
    """Compare the normals where opaque rays end with those of points a little aside."""
    points, times, aside = _where_rays_end(output, rays, source)
    nearby = points + SURFACE_OFFSET * scene.config.radius * aside
    return losses.normal_smoothness_3d(scene.normals(points, times), scene.normals(nearby, times))
