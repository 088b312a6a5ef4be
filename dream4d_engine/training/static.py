"""Stage 1: a static scene from priors of images, told a sentence or an image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..guidance.distillation import Guidance
from ..priors.handle import PriorKind
from ..randomness import Draw
from ..scene import Scene, build_scene
from ..supervision import PhotometricWeights, Supervision, Targets, photometric
from .config import OptimizerConfig, ReferenceConfig, StaticRecipe
from .loop import FitSummary, RunControl, train
from .reference import Reference, check_reference, reference_targets
from .stages import GuidanceOf, ParameterGroup, Stage, current_phase, seen_by_priors


def static_groups(scene: Scene, config: OptimizerConfig) -> list[ParameterGroup]:
    """What stage 1 trains: the canonical field and the background."""
    canonical = scene.canonical
    mlps = [*canonical.density_mlp.parameters(), *canonical.color_mlp.parameters()]
    return [
        ("grid", list(canonical.grid.parameters()), config.lr_grid),
        ("mlp", mlps, config.lr_mlp),
        ("background", list(scene.background.parameters()), config.lr_background),
    ]


def seen_in_image(reference: Reference, config: ReferenceConfig, rays_at_once: int | None) -> Supervision:
    """Return the supervision by the image that a scene is made from, at the size of the phase."""
    sizes: dict[int, Targets] = {}  # those that were needed so far

    def targets_at(scene: Scene, progress: float) -> Targets:
        size = current_phase(config.phases, progress).size
        if size not in sizes:
            sizes[size] = reference_targets(reference, config, size, scene.device)
        return sizes[size]

    weights = PhotometricWeights(
        config.rgb, config.mask, config.depth, config.relative_depth, config.normal, config.entropy
    )
    return photometric("reference", targets_at, weights, config.ray_jitter, rays_at_once)


def static_stage(recipe: StaticRecipe, scene: Scene, reference: Reference | None = None) -> Stage:
    """Return stage 1 on `scene`, which is trained in place; `reference` is what a recipe with one needs."""
    check_reference(recipe, reference)

    def supervisions(guidance: GuidanceOf, rays_at_once: int | None) -> tuple[Supervision, ...]:
        priors = seen_by_priors(recipe, guidance, rays_at_once)
        if recipe.reference is None or reference is None:  # both or neither
            return priors
        return (*priors, seen_in_image(reference, recipe.reference, rays_at_once))

    looked_at = () if recipe.reference is None else recipe.reference.phases
    starts = sorted({phase.start for phase in recipe.phases} | {phase.start for phase in looked_at})
    groups = static_groups(scene, recipe.optimizer)
    return Stage("static", scene, groups, recipe, supervisions, starts, finish=scene.refresh_occupancy)


def first_scene(recipe: StaticRecipe, seed: int) -> Scene:
    """What stage 1 begins with where it is given nothing."""
    return build_scene(recipe.scene, Draw(seed).for_("scene"))


def train_static(
    recipe: StaticRecipe,
    guidance: Mapping[PriorKind, Guidance],
    *,
    seed: int,
    device: torch.device,
    control: RunControl,
    scene: Scene | None = None,
    reference: Reference | None = None,
) -> tuple[Scene, FitSummary]:
    """Run stage 1 and return the finished scene; `scene`, if given, is where it starts (a copy is trained).

    A recipe with a reference needs one. The caller puts its fingerprint into the control's identity.
    """
    start = first_scene(recipe, seed) if scene is None else scene.clone()
    stage = static_stage(recipe, start.to(device), reference)
    return stage.scene, train(stage, guidance, seed, control)


@torch.no_grad()
def solid_points(scene: Scene, resolution: int = 48) -> Tensor:
    """Return the middles [S, 3] of the box's cells in which the still object is solid, in radii."""
    axis = (torch.arange(resolution, device=scene.device) + 0.5) / resolution * 2 - 1
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    return points[scene.is_solid(scene.canonical.density((points + 1) / 2, scene.kernels))]


def object_extent(scene: Scene, quantile: float = 0.99) -> float:
    """Return how far the still object reaches from the vertical axis or the middle height, as a share of the radius.

    The furthest points, those above the `quantile`, don't count. An empty scene has extent 0.
    """
    solid = solid_points(scene)
    if not len(solid):
        return 0.0
    # any camera may turn around the axis: sideways, a point takes its distance from that
    reach = torch.maximum(solid[:, 2].abs(), solid[:, :2].norm(dim=-1)).sort().values
    return float(reach[min(int(quantile * len(reach)), len(reach) - 1)])
