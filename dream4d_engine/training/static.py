"""Stage 1: a static scene from priors of pictures, told a sentence or a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..cameras import sample_views
from ..guidance.distillation import Guidance
from ..priors.loading import PriorKind
from ..scene import Scene, build_scene
from .config import OptimizerConfig, StaticRecipe
from .lookahead import Views
from .loop import FitSummary, Objective, ParameterGroup, RunControl, fit
from .memory import fit_into
from .objectives import (
    Terms,
    current_phase,
    pick_guidance,
    picture_loss,
    picture_view,
    prepare_reference_view,
    reference_loss,
)
from .reference import Reference, ReferenceView, check_reference, reference_view


def static_groups(scene: Scene, config: OptimizerConfig) -> list[ParameterGroup]:
    """What stage 1 trains: the canonical field and the background."""
    canonical = scene.canonical
    mlps = [*canonical.density_mlp.parameters(), *canonical.color_mlp.parameters()]
    return [
        ("grid", list(canonical.grid.parameters()), config.lr_grid),
        ("mlp", mlps, config.lr_mlp),
        ("background", list(scene.background.parameters()), config.lr_background),
    ]


def static_objective(
    recipe: StaticRecipe,
    guidance: Mapping[PriorKind, Guidance],
    reference: Reference | None = None,
    rays_at_once: int | None = None,
) -> Objective:
    """Return what draws cameras, renders them and asks the priors, then compares with the picture.

    `reference` is what a recipe with a reference needs, and only that. `rays_at_once`: see RenderOptions.
    """
    pairs = pick_guidance(recipe.guidance, guidance)
    check_reference(recipe, reference)
    sizes: dict[int, ReferenceView] = {}  # the picture at the sizes that were needed so far

    def picture(scene: Scene, progress: float) -> ReferenceView:
        size = current_phase(recipe.reference.phases, progress).size
        if size not in sizes:
            sizes[size] = reference_view(reference, recipe.reference, size, scene.device)
        return sizes[size]

    def prepare(scene: Scene, progress: float, generator: torch.Generator) -> Views:
        phase = current_phase(recipe.phases, progress)
        size = (phase.height, phase.width)
        cameras = sample_views(recipe.cameras, phase.n_groups, recipe.n_views, *size, generator)
        view = picture_view(scene, cameras, recipe, progress, generator, rays_at_once)
        if recipe.reference is None:
            return (view,)
        cameras = picture(scene, progress).cameras
        return view, prepare_reference_view(scene, cameras, recipe.reference, generator, rays_at_once)

    def loss(scene: Scene, views: Views, progress: float, generator: torch.Generator) -> tuple[Tensor, Terms]:
        total, terms = picture_loss(scene, views[0], recipe, pairs, progress, generator)
        if recipe.reference is None:
            return total, terms
        extra, parts = reference_loss(scene, views[1], picture(scene, progress), recipe.reference)
        return total + extra, terms | parts

    return Objective(loss, prepare, looks_ahead=rays_at_once is None)


def train_static(
    recipe: StaticRecipe,
    guidance: Mapping[PriorKind, Guidance],
    *,
    seed: int,
    device: torch.device,
    control: RunControl,
    scene: Scene | None = None,
    reference: Reference | None = None,
    memory_budget: int | None = None,
    on_plan: Callable[[str], None] | None = None,
) -> tuple[Scene, FitSummary]:
    """Run stage 1 and return the finished scene; `scene`, if given, is where it starts (a copy is trained).

    A recipe with a reference needs one. The caller puts its fingerprint into the control's identity.
    `memory_budget`: bytes of GPU memory that the process may take; `on_plan` is told how it does that.
    """
    generator = control.team.generator(seed)
    start = build_scene(recipe.scene, generator) if scene is None else scene.clone()
    start = start.to(device)
    groups = static_groups(start, recipe.optimizer)

    def objective_of(guidance: Mapping[PriorKind, Guidance], rays_at_once: int | None = None) -> Objective:
        return static_objective(recipe, guidance, reference, rays_at_once)

    if memory_budget is None:
        objective = objective_of(guidance)
    else:
        give_up = partial(control.stop_if_asked, "static")
        objective = fit_into(memory_budget, guidance, objective_of, start, groups, _starts(recipe), on_plan, give_up)
    summary = fit(
        start,
        objective,
        groups,
        stage="static",
        steps=recipe.steps,
        optimizer_config=recipe.optimizer,
        loop=recipe.loop,
        generator=generator,
        control=control,
    )
    start.refresh_occupancy()
    return start, summary


def _starts(recipe: StaticRecipe) -> list[float]:
    """Where a step's pictures change their size."""
    looked_at = () if recipe.reference is None else recipe.reference.phases
    return sorted({phase.start for phase in (*recipe.phases, *looked_at)})


@torch.no_grad()
def object_extent(scene: Scene, resolution: int = 48, quantile: float = 0.99) -> float:
    """Return how far the still object reaches from the vertical axis or the middle height, as a share of the radius.

    Points of a regular lattice count where a quarter of the radius of their density would be half opaque; the extent
    is the `quantile` of max(|z|, sqrt(x^2 + y^2)) over them. An empty scene has extent 0.
    """
    device = scene.device
    axis = (torch.arange(resolution, device=device) + 0.5) / resolution * 2 - 1
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    density = scene.canonical.density((points + 1) / 2, scene.kernels)
    solid = points[density * (scene.config.radius / 4) > math.log(2)]
    if not len(solid):
        return 0.0
    reach = torch.maximum(solid[:, 2].abs(), solid[:, :2].norm(dim=-1)).sort().values
    return float(reach[min(int(quantile * len(reach)), len(reach) - 1)])
