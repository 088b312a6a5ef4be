"""Stage 2: a deformation over time of a frozen static scene."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from ..fields.body import BodyMotion
from ..guidance.distillation import Guidance
from ..guidance.windows import windowed
from ..priors.handle import PriorKind
from ..randomness import Draw
from ..scene import Scene
from ..schedules import stepped
from ..supervision import Supervision
from .config import MotionRecipe, OptimizerConfig
from .loop import FitSummary, RunControl, train
from .stages import GuidanceOf, ParameterGroup, Stage, seen_by_priors
from .static import object_extent, solid_points

logger = logging.getLogger(__name__)

_MOMENTS = 24  # at which a motion's size is looked at


def motion_groups(scene: Scene, config: OptimizerConfig) -> list[ParameterGroup]:
    """What stage 2 trains: the deformation and the background; the canonical field stays as it is."""
    deformation = scene.deformation
    if deformation is None:
        raise ValueError("the scene has no deformation that could be trained")
    return [
        ("grid", list(deformation.grid.parameters()), config.lr_grid),
        ("mlp", list(deformation.mlp.parameters()), config.lr_mlp),
        (
            "body",
            [] if deformation.body is None else list(deformation.body.parameters()),
            config.lr_body or config.lr_grid,
        ),
        ("background", list(scene.background.parameters()), config.lr_background),
    ]


def check_scale(scale: float, name: str = "deformation_scale") -> None:
    """Refuse a zoom that no deformation field has; `name`: what it was given as."""
    if not 0.05 <= scale <= 10:
        raise ValueError(f"{name} must lie in [0.05, 10], got {scale}; 1 leaves the size as it is")


def choose_deformation_scale(scene: Scene, recipe: MotionRecipe) -> float:
    """Return the zoom that brings the object to the recipe's target extent; 1 where it is large enough already."""
    extent = object_extent(scene)
    if extent == 0:
        raise ValueError("the scene to animate is empty: nothing in it is solid; train the static stage longer")
    # a scale s shows the canonical field s times larger, so that a small object fills the video prior's frame
    scale = min(recipe.target_extent / extent, recipe.max_scale)
    return scale if scale >= recipe.min_scale else 1.0


@torch.no_grad()
def whole_motion(scene: Scene) -> float:
    """Return how far the motion as a whole takes the object's points, in the mean over them and all moments, in sizes
    of the object: the longest side of the box around it. 0 where nothing does, or nothing is solid.
    """
    field = scene.deformation
    if field is None or field.body is None:
        return 0.0
    solid = solid_points(scene)
    if not len(solid):
        return 0.0
    u = solid * field.config.scale / 2 + 0.5  # as large as it is shown
    size = (u.amax(0) - u.amin(0)).amax()
    moments = torch.linspace(0, 1, _MOMENTS, device=u.device)
    went = [(field.body(u, moment.expand(len(u)), field.shown) - u).norm(dim=-1).mean() for moment in moments]
    return float(torch.stack(went).mean() / size)


def _leave_chance_out(scene: Scene, body: BodyMotion, least: float) -> None:
    """Put an object at rest that moves as a whole, by `body` of the scene, by less than `least` of its size."""
    if not least:
        return
    went = whole_motion(scene)
    if went < least:
        body.reset()
        logger.warning(
            "as a whole the object was moved by %.1f %% of its size, in the mean: that is taken for chance, and it is "
            "at rest now. More steps may find more; on the command line, --motion.least-motion 0 keeps it",
            100 * went,
        )


def motion_stage(scene: Scene, recipe: MotionRecipe, seed: int, deformation_scale: float | None = None) -> Stage:
    """Return stage 2 on a copy of `scene`, where that is; the scale it uses is in its configuration.

    `deformation_scale` None chooses it from the object's extent.
    """
    if deformation_scale is not None:
        check_scale(deformation_scale)
    scale = choose_deformation_scale(scene, recipe) if deformation_scale is None else deformation_scale
    trained = recipe.trained(scene.config).deformation
    assert trained is not None  # it is what stage 2 trains
    deformation, fresh = replace(trained, scale=scale), recipe.fresh_background
    moving = scene.with_deformation(deformation, Draw(seed).for_("deformation"), background=fresh).to(scene.device)
    field = moving.deformation
    assert field is not None  # what `with_deformation` is for
    moving.canonical.requires_grad_(False)  # the optimiser has none of it: its gradient need not be computed
    moving.canonical.soften(recipe.densest, recipe.softness, moving.kernels)
    # what the prior is content with is a motion of its own size, and so the whole one this many times as large
    field.shown = 1 / (recipe.motion_strength or 1.0)

    def begin(progress: float) -> None:
        # coarse to fine: the grid's levels are set free one after the other
        field.set_active_levels(stepped(progress, recipe.first_levels, recipe.level_rate))
        if field.body is not None:
            field.body.doubted = recipe.doubt(progress)

    def supervisions(guidance: GuidanceOf, rays_at_once: int | None) -> tuple[Supervision, ...]:
        if recipe.windows is not None:
            guidance = {kind: windowed(one, recipe.windows) for kind, one in guidance.items()}
        return seen_by_priors(recipe, guidance, rays_at_once)

    def finish() -> None:
        moving.canonical.requires_grad_(True)
        moving.canonical.soften(None, None, moving.kernels)
        if field.body is not None:
            field.body.doubted = 1.0
            _leave_chance_out(moving, field.body, recipe.least_motion)
        field.shown = 1.0
        moving.refresh_occupancy()

    groups, starts = motion_groups(moving, recipe.optimizer), [phase.start for phase in recipe.phases]
    return Stage("motion", moving, groups, recipe, supervisions, starts, begin, finish)


def train_motion(
    scene: Scene,
    recipe: MotionRecipe,
    guidance: Mapping[PriorKind, Guidance],
    *,
    seed: int,
    device: torch.device,
    control: RunControl,
    deformation_scale: float | None = None,
) -> tuple[Scene, FitSummary]:
    """Run stage 2 on a copy of `scene` and return it (see `motion_stage`)."""
    stage = motion_stage(scene.clone().to(device), recipe, seed, deformation_scale)
    return stage.scene, train(stage, guidance, seed, control)
