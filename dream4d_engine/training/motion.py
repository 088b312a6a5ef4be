"""Stage 2: a deformation over time of a frozen static scene."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..cameras import sample_takes
from ..guidance.distillation import Guidance
from ..priors.loading import PriorKind
from ..scene import Scene
from ..schedules import stepped
from .config import MotionRecipe, OptimizerConfig
from .lookahead import Views
from .loop import FitSummary, Objective, ParameterGroup, RunControl, fit
from .memory import fit_into
from .objectives import Terms, current_phase, pick_guidance, picture_loss, picture_view
from .static import object_extent


def motion_groups(scene: Scene, config: OptimizerConfig) -> list[ParameterGroup]:
    """What stage 2 trains: the deformation and the background; the canonical field stays as it is."""
    deformation = scene.deformation
    return [
        ("grid", list(deformation.grid.parameters()), config.lr_grid),
        ("mlp", list(deformation.mlp.parameters()), config.lr_mlp),
        ("background", list(scene.background.parameters()), config.lr_background),
    ]


def check_scale(scale: float) -> None:
    """Refuse a zoom that no deformation field has."""
    if not 0.05 <= scale <= 10:
        raise ValueError(f"deformation_scale must lie in [0.05, 10], got {scale}; 1 leaves the size as it is")


def choose_deformation_scale(scene: Scene, recipe: MotionRecipe) -> float:
    """Return the zoom that brings the object to the recipe's target extent.

    A scale s shows the canonical field s times larger, so that a small object fills the frame that the video
    prior sees; it is 1 where the object is already large enough.
    """
    extent = object_extent(scene)
    if extent == 0:
        raise ValueError("the scene to animate is empty: nothing in it is solid; train the static stage longer")
    scale = min(recipe.target_extent / extent, recipe.max_scale)
    return scale if scale >= recipe.min_scale else 1.0


def motion_objective(
    recipe: MotionRecipe, guidance: Mapping[PriorKind, Guidance], rays_at_once: int | None = None
) -> Objective:
    """Return what films a random take and asks the video prior; rays_at_once: see RenderOptions."""
    pairs = pick_guidance(recipe.guidance, guidance)

    def prepare(scene: Scene, progress: float, generator: torch.Generator) -> Views:
        phase = current_phase(recipe.phases, progress)
        size = (phase.height, phase.width)
        takes = sample_takes(recipe.cameras, phase.n_groups, recipe.n_frames, *size, generator, recipe.time_span)
        return (picture_view(scene, takes, recipe, progress, generator, rays_at_once),)

    def loss(scene: Scene, views: Views, progress: float, generator: torch.Generator) -> tuple[Tensor, Terms]:
        scene.deformation.set_active_levels(stepped(progress, recipe.first_levels, recipe.level_rate))
        return picture_loss(scene, views[0], recipe, pairs, progress, generator)

    return Objective(loss, prepare, looks_ahead=rays_at_once is None)


def train_motion(
    scene: Scene,
    recipe: MotionRecipe,
    guidance: Mapping[PriorKind, Guidance],
    *,
    seed: int,
    device: torch.device,
    control: RunControl,
    deformation_scale: float | None = None,
    memory_budget: int | None = None,
    on_plan: Callable[[str], None] | None = None,
) -> tuple[Scene, FitSummary]:
    """Run stage 2 on a copy of `scene` and return it; the scale it used is in its configuration.

    `deformation_scale` None chooses it from the object's extent. `memory_budget`, `on_plan`: see train_static.
    """
    if deformation_scale is not None:
        check_scale(deformation_scale)
    generator = control.team.generator(seed)
    scene = scene.clone().to(device)
    scale = choose_deformation_scale(scene, recipe) if deformation_scale is None else deformation_scale
    moving = scene.with_deformation(
        replace(recipe.deformation, scale=scale), generator, background=recipe.fresh_background
    ).to(device)
    moving.canonical.requires_grad_(False)
    groups = motion_groups(moving, recipe.optimizer)

    def objective_of(guidance: Mapping[PriorKind, Guidance], rays_at_once: int | None = None) -> Objective:
        return motion_objective(recipe, guidance, rays_at_once)

    if memory_budget is None:
        objective = objective_of(guidance)
    else:
        give_up = partial(control.stop_if_asked, "motion")
        starts = [phase.start for phase in recipe.phases]
        objective = fit_into(memory_budget, guidance, objective_of, moving, groups, starts, on_plan, give_up)
    summary = fit(
        moving,
        objective,
        groups,
        stage="motion",
        steps=recipe.steps,
        optimizer_config=recipe.optimizer,
        loop=recipe.loop,
        generator=generator,
        control=control,
    )
    moving.canonical.requires_grad_(True)
    moving.refresh_occupancy()
    return moving, summary
