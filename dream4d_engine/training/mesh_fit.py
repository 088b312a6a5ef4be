"""A static scene from a mesh: a field that looks like it from everywhere, and is solid where it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..cameras import CameraBatch, make_cameras
from ..mesh import MeshError
from ..meshes import Model, Placement
from ..meshes.look import MeshImages, Surface, look_at, surface_of
from ..occupancy import MAX_THRESHOLD
from ..randomness import Draw
from ..rendering import RenderOptions, render_chunked
from ..scene import Scene, build_scene
from ..supervision import Sightings, SightWeights, Supervision, known_in_space, seen_along_rays
from .config import MESH, MESH_QUICK, MeshRecipe
from .loop import FitSummary, RunControl, train
from .stages import GuidanceOf, Stage, current_phase
from .static import static_groups

_DISTANCE = 3.0
"""Of the cameras, in radii of the box."""
_SLACK = 0.02
"""A step in depth from pixel to pixel up to which a surface may be slanted, in radii; beyond, it is an edge."""


def mesh_recipe(device: torch.device) -> MeshRecipe:
    """The recipe that suits a device."""
    return MESH if device.type == "cuda" else MESH_QUICK


def fit_mesh(
    model: Model,
    placement: Placement,
    recipe: MeshRecipe | None = None,
    *,
    seed: int,
    device: torch.device,
    control: RunControl,
    on_look: Callable[[float], None] | None = None,
) -> tuple[Scene, FitSummary]:
    """Fit a fresh scene to a mesh, on `device`; `recipe` None: the one that suits it.

    `on_look` is told the share of the views drawn, 0 to 1, before the first step; the steps are told to the control,
    which may stop them (`Interrupted`) and save them. Raises a MeshError where nothing of the mesh is to be seen.
    """
    recipe = recipe or mesh_recipe(device)
    scene = build_scene(recipe.scene, Draw(seed).for_("scene")).to(device)

    def look(share: float) -> None:
        control.stop_if_asked(recipe.stage)
        if on_look is not None:
            on_look(share)

    stage = mesh_stage(recipe, scene, sightings_of(surface_of(model, placement, device), recipe, look))
    return scene, train(stage, {}, seed, control)


def mesh_stage(recipe: MeshRecipe, scene: Scene, sightings: Sightings) -> Stage:
    """Return the stage that fits `scene`, which is trained in place."""

    def weights_at(progress: float) -> SightWeights:
        return current_phase(recipe.phases, progress)

    def supervisions(guidance: GuidanceOf, rays_at_once: int | None) -> tuple[Supervision, ...]:
        rays = seen_along_rays(sightings, weights_at, rays_at_once)
        return rays, known_in_space(sightings, weights_at, rays.view)

    starts = [phase.start for phase in recipe.phases]
    groups = static_groups(scene, recipe.optimizer)

    def finish() -> None:
        scene.refresh_occupancy()
        _occupy(scene, sightings)

    return Stage(recipe.stage, scene, groups, recipe, supervisions, starts, finish=finish)


def _occupy(scene: Scene, sightings: Sightings) -> None:
    """Call the cells occupied that hold the surface, and those empty that are far from it in the open.

    A look into a cell easily misses what is thinner; and a few of a grid's hashed entries belong to the open, too.
    """
    grid, radius, n = scene.occupancy, scene.config.radius, scene.occupancy.resolution
    surface = torch.zeros_like(grid.occupied)
    for hits in sightings.hits.split(2**20):
        origins, directions = sightings.rays(hits)
        points = origins + (sightings.depth[hits, None] + scene.config.step_size() / 2) * directions
        x, y, z = ((points / radius + 1) / 2 * n).long().clamp(0, n - 1).unbind(-1)
        surface[x, y, z] = True
    ticks = ((torch.arange(n, device=surface.device) + 0.5) / n * 2 - 1) * radius
    middles = torch.cartesian_prod(ticks, ticks, ticks)
    solid = ~torch.cat([sightings.are_free(part) for part in middles.split(2**15)]).view_as(surface)
    near = torch.nn.functional.max_pool3d((surface | solid).float()[None], 3, 1, 1)[0] > 0  # and all cells around
    grid.occupied.copy_(surface | grid.occupied & near)
    values = torch.where(surface, grid.values.clamp_min(2 * MAX_THRESHOLD), grid.values)
    grid.values.copy_(torch.where(near, values, 0.0))


def cameras_around(surface: Surface, n_views: int, size: int, radius: float) -> CameraBatch:
    """Cameras [n_views, 1] all around a mesh, evenly spaced on a sphere, that see it as large as it fits."""
    number = torch.arange(n_views)
    azimuth = number * (math.pi * (3 - 5**0.5))  # the golden angle
    elevation = torch.asin(1 - (2 * number + 1) / n_views)  # equal areas
    reach = float(surface.triangles.norm(dim=-1).max())  # all cameras look at the origin
    distance = max(_DISTANCE * radius, 2 * reach)
    half = 1.05 * math.asin(max(reach, 1e-3 * radius) / distance)
    azimuth = torch.remainder(azimuth + math.pi, 2 * math.pi) - math.pi
    return make_cameras(azimuth[:, None], elevation[:, None], distance, 2 * half, 0.0, size, size)


def sightings_of(surface: Surface, recipe: MeshRecipe, on_progress: Callable[[float], None]) -> Sightings:
    """Look at a mesh from all around."""
    size, n_views = recipe.view_size, recipe.n_views
    cameras = cameras_around(surface, n_views, size, recipe.scene.radius).to(surface.triangles.device)
    rgb, depth, free = [], [], []
    for view in range(n_views):
        on_progress(view / n_views)
        image = look_at(surface, cameras.groups(slice(view, view + 1)), supersample=1)
        covered = image.mask.view(size, size) > 0.5
        seen = image.depth.view(size, size)
        rgb.append((image.rgb.view(-1, 3) * 255).round().byte())
        depth.append(torch.where(covered, seen, torch.inf).flatten())
        free.append(_certainly_free(seen, covered, _SLACK * recipe.scene.radius).flatten())
    on_progress(1.0)
    flat = torch.cat(depth)
    hits, misses = flat.isfinite().nonzero()[:, 0], flat.isinf().nonzero()[:, 0]
    if not len(hits):
        raise MeshError("nothing of the mesh is to be seen: its faces have no area, or its material is transparent")
    return Sightings(cameras, torch.cat(rgb), flat, torch.cat(free), hits, misses)


def _certainly_free(depth: Tensor, covered: Tensor, most: float) -> Tensor:
    """Up to where all is free along all rays of a pixel [H, W]: a slanted surface is nearer at the pixel's edge."""
    slack = torch.zeros_like(depth)
    for dim in (0, 1):
        step = depth.diff(dim=dim).abs().clamp_max(most)
        both = covered.narrow(dim, 1, depth.shape[dim] - 1) & covered.narrow(dim, 0, depth.shape[dim] - 1)
        step = torch.where(both, step, 0.0)
        for first in (0, 1):  # each of the two pixels
            part = slack.narrow(dim, first, depth.shape[dim] - 1)
            part.copy_(torch.maximum(part, step))
    return torch.where(covered, depth - slack / 2, torch.inf)


def mesh_match(scene: Scene, images: MeshImages, cameras: CameraBatch) -> tuple[float, float]:
    """How alike a scene and images of its mesh are, over all views together, both before white.

    Returns (PSNR in dB over whole images, IoU of the silhouettes where more than half is covered).
    """
    found = render_chunked(scene, cameras, RenderOptions(background=torch.ones(3)))
    rgb, mask = images.rgb.cpu(), images.mask.cpu()
    wanted = rgb * mask + (1 - mask)
    error = (found.rgb.clamp(0, 1) - wanted).square().mean()
    solid, covered = found.opacity > 0.5, mask > 0.5
    iou = (solid & covered).sum() / (solid | covered).sum().clamp_min(1)
    return float(-10 * torch.log10(error.clamp_min(1e-12))), float(iou)
