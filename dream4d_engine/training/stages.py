"""A stage of training as a value: what is trained, and what looks at it. static.py and motion.py make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from ..cameras import CameraBatch
from ..guidance.distillation import Guidance
from ..priors.handle import PriorKind
from ..randomness import Draw
from ..rendering import RenderOptions
from ..scene import Scene
from ..supervision import RegularizerWeights, SightWeights, Supervision, distillation, regularisers, training_view
from .config import MeshRecipe, MotionRecipe, Phase, ReferencePhase, StaticRecipe

AnyPhase = TypeVar("AnyPhase", Phase, ReferencePhase, SightWeights)
GuidanceOf = Mapping[PriorKind, Guidance]
ParameterGroup = tuple[str, list[nn.Parameter], float]
"""(name, parameters, learning rate)."""


@dataclass(frozen=True, eq=False)
class Stage:
    """What a run trains, and how."""

    name: str  # in reports and messages
    scene: Scene  # trained in place
    groups: Sequence[ParameterGroup]  # the parameters that are trained
    recipe: StaticRecipe | MotionRecipe | MeshRecipe  # steps, optimiser and loop are taken from it
    # (guidance, rays at once or None for all, see RenderOptions) -> what every step minimises
    supervisions: Callable[[GuidanceOf, int | None], tuple[Supervision, ...]]
    starts: Sequence[float] = (0.0,)  # shares of the run at which a step's size changes
    begin: Callable[[float], None] = lambda progress: None  # called with the progress before every step
    finish: Callable[[], None] = lambda: None  # called once, when all steps are done


def current_phase(phases: Sequence[AnyPhase], progress: float) -> AnyPhase:
    """Return the last phase that has begun."""
    begun = [phase for phase in phases if phase.start <= progress + 1e-9]  # step / steps may lie just below a start
    if not begun:
        raise ValueError(f"no phase begins at progress 0: the first begins at {phases[0].start}")
    return begun[-1]


def seen_by_priors(
    recipe: StaticRecipe | MotionRecipe, guidance: GuidanceOf, rays_at_once: int | None
) -> tuple[Supervision, ...]:
    """Return the recipe's priors and regularisers, all of which look at the same view."""
    wanted = [term for term in recipe.guidance if term.weight]
    missing = [term.prior for term in wanted if term.prior not in guidance]
    if missing:
        raise ValueError(f"the recipe needs a prior of kind {missing[0]!r}: give one, or set its weight to 0")

    def cameras(progress: float, draw: Draw) -> CameraBatch:
        phase = current_phase(recipe.phases, progress)
        return recipe.sample_cameras(phase, draw.groups("cameras", phase.n_groups))

    def weights_at(progress: float) -> RegularizerWeights:
        phase = current_phase(recipe.phases, progress)
        if phase.displacement_tv is None:
            return recipe.regularizers
        return replace(recipe.regularizers, displacement_tv=phase.displacement_tv)

    def options(progress: float) -> RenderOptions:
        weights = weights_at(progress)
        return RenderOptions(
            # the smoothness in 3D asks the scene itself
            normals=bool(weights.orientation or weights.normal_smoothness_2d),
            displacement=bool(weights.displacement_tv),
            z_variance=bool(weights.z_variance),
            rays_at_once=rays_at_once,
        )

    view = training_view(cameras, options, recipe.background, recipe.gradient_frames)
    priors = (distillation(term.prior, term.weight, guidance[term.prior], view) for term in wanted)
    return (*priors, regularisers(weights_at, view))
