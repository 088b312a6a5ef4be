"""Supervision by a surface that is known from many sides: single rays that see it or miss it, and points around it.

What is free is told by sight: a point is free where some camera sees past it, solid where none does. So a mesh need not
be closed, and layers that nobody can see don't count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cameras import CameraBatch
from ..randomness import Draw
from ..rays import RayBundle
from ..rendering import RenderOptions, RenderOutput, View
from ..scene import Scene
from ..transfers import send
from . import losses
from .record import Supervision, Terms, ViewFunction

OFFSETS = (0.005, 0.02, 0.08)
"""Standard deviations, in radii, of how far from the surface points are asked for, as many at each."""


@dataclass(frozen=True)
class Sightings:
    """What V cameras see of a surface, in H x W pixels: N = V * H * W rays through the pixels' middles."""

    cameras: CameraBatch  # [V, 1]
    rgb: Tensor  # [N, 3] uint8, of no meaning where a ray meets nothing
    depth: Tensor  # [N] along the ray, infinite where it meets nothing
    free: Tensor  # [N], up to where all is free for certain along the pixel's rays
    hits: Tensor  # [K], which rays meet the surface
    misses: Tensor  # [L], which don't

    def rays(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Origins and unit directions [S, 3] of rays [S]."""
        height, width = self.cameras.height, self.cameras.width
        view, pixel = index // (height * width), index % (height * width)
        c2w = self.cameras.c2w[:, 0][view]
        slope = 2 * torch.tan(self.cameras.fov_y[:, 0][view] / 2) / height
        x, y = (pixel % width + 0.5 - width / 2) * slope, (height / 2 - pixel // width - 0.5) * slope
        local = torch.stack((x, y, -torch.ones_like(x)), -1)
        directions = (c2w[:, :3, :3] * local[:, None]).sum(-1)
        return c2w[:, :3, 3], F.normalize(directions, dim=-1)

    def are_free(self, points: Tensor) -> Tensor:
        """[S] bool: does any camera see past these points [S, 3]?"""
        height, width = self.cameras.height, self.cameras.width
        c2w, focal = self.cameras.c2w[:, 0], 0.5 * height / torch.tan(self.cameras.fov_y[:, 0] / 2)
        # R^T (p - o) for all cameras in one product
        turn = c2w[:, :3, :3].permute(1, 2, 0).reshape(3, -1)  # columns: right of all, up of all, back of all
        moved = (points @ turn).view(len(points), 3, -1) - (c2w[:, :3, :3] * c2w[:, :3, 3:]).sum(1).mT
        right, up, back = moved.unbind(1)
        ahead = (-back).clamp_min(1e-6)
        column = (width / 2 + focal * right / ahead).long()
        row = (height / 2 - focal * up / ahead).long()
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height) & (back < 0)
        first = torch.arange(len(c2w), device=points.device) * (height * width)
        place = torch.where(inside, first + row * width + column, 0)
        return (inside & (moved.square().sum(1).sqrt() < self.free[place])).any(-1)


@dataclass(frozen=True)
class SightWeights:
    """How many rays and points a step asks for from a share of the run on, and what they weigh; 0 leaves one out."""

    start: float  # share of the run
    n_rays: int  # half of them meet the surface
    n_points: int  # on, around and far from the surface
    rgb: float = 1.0  # of the rays' colours' squared error
    mask: float = 1.0  # of the rays' opacities' squared error
    solid: float = 1.0  # of the points' binary entropy between what is solid and what is free
    color: float = 1.0  # of the colours' squared error on the surface


def seen_along_rays(
    sightings: Sightings, weights_at: Callable[[float], SightWeights], rays_at_once: int | None = None
) -> Supervision:
    """Return the supervision that renders rays drawn from all cameras, half of which meet the surface."""
    options = RenderOptions(stratified=True, rays_at_once=rays_at_once)

    def chosen(progress: float, draw: Draw) -> Tensor:
        n = weights_at(progress).n_rays
        source = draw.for_("rays")
        hits = torch.randint(len(sightings.hits), (n - n // 2,), generator=source)
        hits = sightings.hits[send(hits, sightings.hits.device)]
        if not len(sightings.misses):
            return hits
        misses = torch.randint(len(sightings.misses), (n // 2,), generator=source)
        return torch.cat((hits, sightings.misses[send(misses, hits.device)]))

    def view(scene: Scene, progress: float, draw: Draw) -> View:
        index = chosen(progress, draw)
        origins, directions = sightings.rays(index)
        n = len(index)
        bundle = RayBundle(origins, directions, torch.zeros_like(origins[:, 0]), (1, 1, 1, n))
        jitter = send(torch.rand(n, generator=draw.for_("jitter")), scene.device)
        return View(sightings.cameras.groups(slice(0, 1)), options, bundle, None, jitter)

    def loss(scene: Scene, output: RenderOutput, view: View, progress: float, draw: Draw) -> Terms:
        weights, index = weights_at(progress), chosen(progress, draw)
        shape = view.rays.shape
        rgb = (sightings.rgb[index].float() / 255).view(*shape, 3)
        mask = sightings.depth[index].isfinite().float().view(*shape, 1)
        parts = {}
        if weights.rgb:
            parts["mesh.rgb"] = weights.rgb * losses.reference_rgb(output, rgb, mask)
        if weights.mask:
            parts["mesh.mask"] = weights.mask * losses.reference_mask(output.opacity, mask)
        return Terms(parts)

    return Supervision("rays", view, loss)


def known_in_space(
    sightings: Sightings, weights_at: Callable[[float], SightWeights], view: ViewFunction
) -> Supervision:
    """Return the supervision by points: solid or free as the cameras see them, and of the surface's own colour.

    `view`: that of another supervision; nothing is rendered for this one. What is solid should be opaque over the step
    of a ray, d, and what is free clear: the binary entropy of alpha = 1 - exp(-density d).
    """

    def loss(scene: Scene, output: RenderOutput, view: View, progress: float, draw: Draw) -> Terms:
        weights, source = weights_at(progress), draw.for_("points")
        n, device, step = weights.n_points, scene.device, scene.config.step_size()
        if not n or not (weights.solid or weights.color):
            return Terms({})
        index = sightings.hits[send(torch.randint(len(sightings.hits), (n,), generator=source), device)]
        origins, directions = sightings.rays(index)
        surface = origins + sightings.depth[index, None] * directions
        # the skin: as thick as a ray's step, so that open sheets, too, have an inside
        skin = surface + step * send(torch.rand(n, 1, generator=source), device) * directions
        spread = torch.tensor(OFFSETS).repeat(n // len(OFFSETS) + 1)[:n, None]
        aside = torch.randn(n, 3, generator=source) * spread
        far = torch.rand(n, 3, generator=source) * 2 - 1
        radius = scene.config.radius
        others = torch.cat((surface + radius * send(aside, device), radius * send(far, device))).clamp(-radius, radius)
        points = torch.cat((skin, others))
        found = scene.query(points, torch.zeros_like(points[:, 0]))
        parts = {}
        if weights.solid:
            solid = torch.cat((torch.ones(n, dtype=torch.bool, device=device), ~sightings.are_free(others)))
            depth = found.density * step  # optical, of a step
            opaque = -torch.log(-torch.expm1(-depth.clamp_min(1e-6)))
            parts["mesh.solid"] = weights.solid * torch.where(solid, opaque, depth).mean()
        if weights.color:
            wanted = sightings.rgb[index].float() / 255
            parts["mesh.color"] = weights.color * (found.rgb[:n] - wanted).square().mean()
        # every process asks about all points
        return Terms({name: view.division.once(value) for name, value in parts.items()})

    return Supervision("points", view, loss)
