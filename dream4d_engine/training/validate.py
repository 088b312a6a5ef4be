"""What a recipe's numbers must keep to, asked before a run touches anything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass

from .config import TRAINED_STRENGTHS, MotionRecipe, Phase, ReferenceConfig, ReferencePhase, StaticRecipe


def check_recipe(recipe: StaticRecipe | MotionRecipe, where: str = "recipe") -> None:
    """Raise a ValueError that names the first number which no run can be made with.

    `where` is the recipe's own name in the message; a place is written as its flag is: "static.phases.0.height".
    """
    for place, value in _numbers(recipe, where):
        if not math.isfinite(value):
            raise ValueError(f"{place} must be a finite number, got {value}")
    if recipe.steps < 1:
        raise ValueError(f"a run needs at least one step, got {where}.steps = {recipe.steps}")
    _at_least(1, recipe, where, recipe.group_field)
    _check_phases(recipe.phases, f"{where}.phases", "n_groups", "height", "width")
    for index, term in enumerate(recipe.guidance):
        _at_least(0, term, f"{where}.guidance.{index}", "weight")
        away = term.distillation.max_azimuth_deg
        if not 0 < away <= 180:
            raise ValueError(
                f"{where}.guidance.{index}.distillation.max_azimuth_deg must lie in (0, 180], got {away}: 180 asks "
                "the prior for all views"
            )
    for name in ("probability", "low", "high"):
        if not 0 <= getattr(recipe.background, name) <= 1:
            raise ValueError(f"{where}.background.{name} must lie in [0, 1], got {getattr(recipe.background, name)}")
    _at_least(0, recipe.regularizers, f"{where}.regularizers", "rigidity")
    if recipe.regularizers.rigidity and recipe.stage != "motion":
        raise ValueError(
            f"{where}.regularizers.rigidity is about motion, which a still scene has none of: leave it at 0"
        )
    rates = ("lr_grid", "lr_mlp", "lr_body", "lr_background")
    _at_least(0, recipe.optimizer, f"{where}.optimizer", "eps", "weight_decay", *rates, "factor")
    if not all(0 <= beta < 1 for beta in recipe.optimizer.betas):
        raise ValueError(f"{where}.optimizer.betas must lie in [0, 1), got {recipe.optimizer.betas}")
    _at_least(1, recipe.loop, f"{where}.loop", "occupancy_every", "checkpoint_steps")
    _at_least(0, recipe.loop, f"{where}.loop", "checkpoint_seconds", "max_bad_steps")
    if recipe.stage == "motion":
        _check_motion(recipe, where)
    if recipe.reference is not None:
        _check_reference(recipe.reference, f"{where}.reference")
    if recipe.orbit is not None:
        _check_orbit(recipe, where)


def _numbers(value: object, place: str) -> Iterator[tuple[str, float]]:
    """Every float in a tree of dataclasses and tuples, with its place."""
    if isinstance(value, float):
        yield place, value
    elif is_dataclass(value):
        for f in fields(value):
            yield from _numbers(getattr(value, f.name), f"{place}.{f.name}")
    elif isinstance(value, tuple):
        for index, part in enumerate(value):
            yield from _numbers(part, f"{place}.{index}")


def _at_least(low: float, config: object, where: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) < low:
            raise ValueError(f"{where}.{name} must be at least {low}, got {getattr(config, name)}")


def _check_phases(phases: Sequence[Phase | ReferencePhase], where: str, *names: str) -> None:
    if not phases or phases[0].start > 0:
        raise ValueError(f"{where} must have one that starts at 0: it says what the run begins with")
    for index, phase in enumerate(phases):
        _at_least(1, phase, f"{where}.{index}", *names)
        if index and phase.start < phases[index - 1].start:
            raise ValueError(f"{where}.{index}.start must not lie before the one of the phase before it")


def _check_reference(reference: ReferenceConfig, where: str) -> None:
    _check_phases(reference.phases, f"{where}.phases", "size")
    low, high = reference.fill
    if not 0.05 <= low <= high <= 1:
        raise ValueError(f"{where}.fill must keep to 0.05 <= least <= largest share <= 1, got {reference.fill}")
    if not -90 <= reference.elevation_deg <= 90:
        raise ValueError(f"{where}.elevation_deg must lie in [-90, 90], got {reference.elevation_deg}")
    if not 0 < reference.fov_y_deg < 180:
        raise ValueError(f"{where}.fov_y_deg must lie in (0, 180), got {reference.fov_y_deg}")
    if reference.distance <= 0:
        raise ValueError(f"{where}.distance must be above 0, got {reference.distance}")
    weights = ("rgb", "mask", "depth", "relative_depth", "normal", "entropy")
    _at_least(0, reference, where, "ray_jitter", *weights)


def _check_orbit(recipe: StaticRecipe, where: str) -> None:
    if recipe.reference is None:
        raise ValueError(f"{where}.orbit ends where an image was seen from, and this recipe has no {where}.reference")
    _at_least(2, recipe, where, "n_views")
    low, high = recipe.cameras.elevation_deg
    elevation = recipe.reference.elevation_deg
    if not low <= elevation <= high or abs(elevation) == 90:
        raise ValueError(
            f"{where}.orbit ends where the image was seen from: {where}.reference.elevation_deg must lie in "
            f"{where}.cameras.elevation_deg, from {low:g} to {high:g}, and below 90, got {elevation:g}"
        )


def _check_loop(recipe: MotionRecipe, where: str) -> None:
    if recipe.loop_starts is None:
        return
    if not recipe.deformation.loop:
        raise ValueError(f"{where}.loop_starts is about loops: make the motion one by {where}.deformation.loop, too")
    low, high = recipe.loop_starts
    if not -1 <= low <= high <= 1:
        raise ValueError(f"{where}.loop_starts must keep to -1 <= first <= last <= 1, got {recipe.loop_starts}")


def _check_motion(recipe: MotionRecipe, where: str) -> None:
    low, high = recipe.time_span
    if not 0 < low <= high <= 1:
        raise ValueError(f"{where}.time_span must keep to 0 < shortest <= longest <= 1, got {recipe.time_span}")
    _at_least(0, recipe, where, "least_motion")
    _at_least(0, recipe.doubt, f"{where}.doubt", "first", "last")
    _check_loop(recipe, where)
    if recipe.deformation.length is not None:
        raise ValueError(f"{where}.deformation.length follows from the frames that are asked for: leave it away")
    if recipe.windows is not None and recipe.windows.n_frames != recipe.n_frames:
        raise ValueError(
            f"{where}.windows cut takes of {recipe.windows.n_frames} frames, and {where}.n_frames is {recipe.n_frames}"
        )
    if recipe.gradient_frames is not None and recipe.gradient_frames < 1:
        raise ValueError(
            f"{where}.gradient_frames must be at least 1, got {recipe.gradient_frames}: leave it away for all frames"
        )
    _at_least(0, recipe, where, "first_levels", "level_rate")
    least, largest = TRAINED_STRENGTHS
    if not least <= (recipe.motion_strength or 1.0) <= largest or recipe.motion_strength == 0:
        raise ValueError(
            f"{where}.motion_strength must lie in [{least:g}, {largest:g}], got {recipe.motion_strength:g}: 1 moves "
            "as the prior asks for"
        )
    for name in ("target_extent", "min_scale", "max_scale", "densest"):
        if getattr(recipe, name) is not None and getattr(recipe, name) <= 0:
            raise ValueError(f"{where}.{name} must be above 0, got {getattr(recipe, name)}")
    if recipe.softness is not None and not 0.004 <= recipe.softness <= 0.1:
        raise ValueError(f"{where}.softness must lie in [0.004, 0.1], got {recipe.softness}")
    if recipe.softness is not None and recipe.densest is None:
        raise ValueError(f"{where}.softness blurs what {where}.densest bends: give that, too, or neither")
