"""The parts that both stages' objectives are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from .. import losses
from ..cameras import CameraBatch
from ..guidance.distillation import Guidance, distill
from ..priors.loading import PriorKind
from ..randomness import same_for_all
from ..rays import RayBundle, rays_from_cameras
from ..rendering import RenderOptions, RenderOutput, View, prepare_view, render_view
from ..scene import Scene
from ..transfers import send
from .config import (
    GuidanceTerm,
    MotionRecipe,
    Phase,
    RandomBackground,
    ReferenceConfig,
    ReferencePhase,
    RegularizerWeights,
    StaticRecipe,
)
from .reference import ReferenceView

Terms = dict[str, Tensor]
AnyPhase = TypeVar("AnyPhase", Phase, ReferencePhase)

SURFACE_OFFSET = 0.01
"""Standard deviation, in radii, of how far aside the 3D smoothness of normals looks (Magic3D 2211.10440)."""


def current_phase(phases: Sequence[AnyPhase], progress: float) -> AnyPhase:
    """Return the last phase that has begun."""
    begun = [phase for phase in phases if phase.start <= progress + 1e-9]
    if not begun:
        raise ValueError(f"no phase begins at progress 0: the first begins at {phases[0].start}")
    return begun[-1]


def draw_background(config: RandomBackground, generator: torch.Generator, device: torch.device) -> Tensor | None:
    """Return a random colour [3] for the whole batch, or None to keep the scene's own background."""
    coin, color = torch.rand((), generator=generator), torch.rand(3, generator=generator)
    if coin >= config.probability:
        return None
    if config.grey:
        color = color[:1].expand(3)
    return send(config.low + (config.high - config.low) * color, device)


def pick_guidance(
    terms: Sequence[GuidanceTerm], guidance: Mapping[PriorKind, Guidance]
) -> list[tuple[GuidanceTerm, Guidance]]:
    """Pair every term of non-zero weight with its prior's guidance; a missing one is an error."""
    wanted = [term for term in terms if term.weight]
    missing = [term.prior for term in wanted if term.prior not in guidance]
    if missing:
        raise ValueError(f"the recipe needs a prior of kind {missing[0]!r}: give one, or set its weight to 0")
    return [(term, guidance[term.prior]) for term in wanted]


def guidance_loss(
    pairs: Sequence[tuple[GuidanceTerm, Guidance]],
    output: RenderOutput,
    cameras: CameraBatch,
    progress: float,
    generator: torch.Generator,
) -> tuple[Tensor, Terms]:
    """Sum the priors' weighted distillation losses on a render."""
    pictures = output.rgb.movedim(-1, 2)
    total, terms = pictures.new_zeros(()), {}
    for term, guidance in pairs:
        result = distill(guidance, pictures, cameras, progress, generator)
        total = total + term.weight * result.loss
        terms |= {f"{term.prior}.{name}": value for name, value in result.terms.items()}
    return total, terms


def picture_view(
    scene: Scene,
    cameras: CameraBatch,
    recipe: StaticRecipe | MotionRecipe,
    progress: float,
    generator: torch.Generator,
    rays_at_once: int | None = None,
) -> View:
    """What the cameras are going to see in training."""
    weights = _weights(recipe, progress)
    options = RenderOptions(
        stratified=True,
        background=draw_background(recipe.background, generator, scene.device),
        normals=bool(weights.orientation or weights.normal_smoothness_2d),
        displacement=bool(weights.displacement_tv),
        rays_at_once=rays_at_once,
    )
    return prepare_view(scene, cameras, options, generator)


def picture_loss(
    scene: Scene,
    view: View,
    recipe: StaticRecipe | MotionRecipe,
    pairs: Sequence[tuple[GuidanceTerm, Guidance]],
    progress: float,
    generator: torch.Generator,
) -> tuple[Tensor, Terms]:
    """Render the view and sum all terms of the recipe's loss."""
    output = render_view(scene, view)
    loss, terms = guidance_loss(pairs, output, view.cameras, progress, generator)
    extra, parts = regularizer_loss(_weights(recipe, progress), output, scene, view.cameras, generator)
    return loss + extra, terms | parts


def _weights(recipe: StaticRecipe | MotionRecipe, progress: float) -> RegularizerWeights:
    phase = current_phase(recipe.phases, progress)
    if phase.displacement_tv is None:
        return recipe.regularizers
    return replace(recipe.regularizers, displacement_tv=phase.displacement_tv)


def prepare_reference_view(
    scene: Scene,
    cameras: CameraBatch,
    config: ReferenceConfig,
    generator: torch.Generator,
    rays_at_once: int | None = None,
) -> View:
    """What the reference camera is going to see."""
    options = RenderOptions(
        stratified=True, normals=bool(config.normal), ray_jitter=config.ray_jitter, rays_at_once=rays_at_once
    )
    with same_for_all(generator):  # the picture is no part of the batch
        return prepare_view(scene, cameras, options, generator)


def reference_loss(scene: Scene, view: View, wanted: ReferenceView, config: ReferenceConfig) -> tuple[Tensor, Terms]:
    """Render what the reference camera sees and sum the weighted differences to the picture and its maps.

    Magic123 (2306.17843), section 3.2. Depths are compared where picture and scene are both solid: the distance to
    what isn't there yet says nothing.
    """
    output = render_view(scene, view)
    solid = (wanted.mask > 0.5).float()
    parts: Terms = {}
    if config.rgb:
        parts["rgb"] = config.rgb * losses.reference_rgb(output, wanted.rgb, wanted.mask)
    if config.mask:
        parts["mask"] = config.mask * losses.reference_mask(output.opacity, wanted.mask)
    if config.entropy:
        parts["entropy"] = config.entropy * losses.opacity_entropy(output.opacity)
    if config.normal:
        parts["normal"] = config.normal * losses.normal(output.normals, wanted.normals, solid)
    if config.depth or config.relative_depth:
        seen = solid * (output.opacity.detach() > 0.5)
        distance = output.depth / output.opacity.clamp_min(0.5)
    if config.depth:
        parts["depth"] = config.depth * losses.depth(distance, wanted.depth, seen)
    if config.relative_depth:
        parts["relative_depth"] = config.relative_depth * losses.relative_depth(distance, wanted.depth, seen)
    total = sum(parts.values(), start=output.opacity.new_zeros(()))
    return total, {f"reference.{name}": value.detach() for name, value in parts.items()}


def regularizer_loss(
    weights: RegularizerWeights, output: RenderOutput, scene: Scene, cameras: CameraBatch, generator: torch.Generator
) -> tuple[Tensor, Terms]:
    """Sum the weighted terms that know no prior; a weight of 0 leaves a term uncomputed."""
    parts: Terms = {}
    if weights.opacity:
        parts["opacity"] = weights.opacity * losses.opacity_sparsity(output.opacity)
    if weights.entropy:
        parts["entropy"] = weights.entropy * losses.opacity_entropy(output.opacity)
    if weights.z_variance:
        parts["z_variance"] = weights.z_variance * losses.z_variance(output.z_variance, output.opacity)
    if weights.displacement_tv:
        parts["displacement_tv"] = weights.displacement_tv * losses.displacement_tv(output.displacement)
    if weights.normal_smoothness_2d:
        parts["normal_2d"] = weights.normal_smoothness_2d * losses.normal_smoothness_2d(output.normals)
    if weights.orientation or weights.normal_smoothness_3d:
        rays = rays_from_cameras(cameras)
    if weights.orientation:
        facing = losses.orientation(output.opacity, output.normals.reshape(-1, 3), rays.directions)
        parts["orientation"] = weights.orientation * facing
    if weights.normal_smoothness_3d:
        parts["normal_3d"] = weights.normal_smoothness_3d * _normal_smoothness(scene, output, rays, generator)
    return sum(parts.values(), start=output.opacity.new_zeros(())), {n: v.detach() for n, v in parts.items()}


def _normal_smoothness(scene: Scene, output: RenderOutput, rays: RayBundle, generator: torch.Generator) -> Tensor:
    """Compare the normals where opaque rays end with those of points a little aside."""
    opacity = output.opacity.detach().reshape(-1)
    seen = opacity > 0.5
    distance = (output.depth.detach().reshape(-1) / opacity.clamp_min(1e-6))[seen]
    points = rays.origins[seen] + distance[:, None] * rays.directions[seen]
    aside = SURFACE_OFFSET * scene.config.radius * torch.randn(points.shape, generator=generator).to(points)
    times = rays.times[seen]
    return losses.normal_smoothness_3d(scene.normals(points, times), scene.normals(points + aside, times))
