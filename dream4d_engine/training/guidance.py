"""From a recipe and the places of its models to the guidance of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ..fields.deformation import MAX_LENGTH
from ..guidance.distillation import Guidance
from ..guidance.windows import Windows
from ..machine import has_own_allocator
from ..priors.handle import Prior, PriorHandle, PriorKind, ReferenceView
from ..priors.networks.execution import PLAIN, Capture, GraphCapture, Runtime
from .config import (
    IMAGE_RECIPES,
    MOTION_RECIPES,
    ORBIT_RECIPES,
    GuidanceTerm,
    LoopConfig,
    MotionRecipe,
    StaticRecipe,
    is_toy,
    shipped_recipe,
)
from .loop import PriorSilent
from .reference import Reference, reference_cameras

logger = logging.getLogger(__name__)

Handles = Mapping[PriorKind, PriorHandle]
_Recipe = TypeVar("_Recipe", StaticRecipe, MotionRecipe)


def active_terms(recipe: StaticRecipe | MotionRecipe) -> list[GuidanceTerm]:
    """The terms of a recipe that take part, and so need a model."""
    return [term for term in recipe.guidance if term.weight]


def prompt_readers(recipe: StaticRecipe | MotionRecipe) -> list[PriorKind]:
    """The kinds of model in a recipe that are told the prompt: those of novel views are told an image."""
    return [term.prior for term in active_terms(recipe) if term.prior != "novel_view"]


def with_frames_of(recipe: _Recipe, handles: Handles) -> _Recipe:
    """Return the recipe with as many frames in a take as its prior must have, in order: nothing is interpolated."""
    wanted = {handle.n_frames for handle in handles.values() if handle.n_frames is not None}
    if len(wanted) > 1:
        raise ValueError(f"the priors want takes of {' and '.join(map(str, sorted(wanted)))} frames: they must agree")
    if not wanted:
        return recipe
    changes: dict[str, Any] = {recipe.group_field: wanted.pop()}
    return replace(recipe, **changes)


def with_views_of(recipe: StaticRecipe, handles: Handles) -> StaticRecipe:
    """Return the recipe with views as its model of novel views sees them: of orbits, as many and in such as it does.

    Raises a ValueError where it sees whole orbits and the recipe makes single views, or the other way round.
    """
    handle = handles.get("novel_view")
    if handle is None or (handle.orbit is None and recipe.orbit is None):
        return recipe
    if recipe.orbit is None:
        others = ", ".join(ORBIT_RECIPES)
        raise ValueError(
            f"{handle.name} sees whole orbits of {handle.n_frames} views, and the recipe {recipe.name!r} makes single "
            f"ones: choose {others}, or connect a model of single views (Zero123)"
        )
    if handle.orbit is None:
        others = ", ".join(name for name, one in IMAGE_RECIPES.items() if not is_toy(one))
        raise ValueError(
            f"{handle.name} sees single views, and the recipe {recipe.name!r} makes whole orbits: choose {others}, or "
            "connect a model of orbits (SV3D)"
        )
    orbit = handle.orbit if recipe.orbit == "dynamic" else recipe.orbit
    return replace(with_frames_of(recipe, {"novel_view": handle}), orbit=orbit)


def with_longer_takes(recipe: MotionRecipe, handles: Handles, n_frames: int | None) -> MotionRecipe:
    """Return the recipe with takes of so many frames, which its prior sees through windows of as many as it has itself.

    `n_frames` None, or as many as those: the recipe as it is. Raises a ValueError where the prior sees fewer at once
    than the recipe says, and where no windows reach so far.
    """
    window = recipe.n_frames if recipe.windows is None else recipe.windows.window
    for handle in handles.values():
        if handle.most_frames is not None and window > handle.most_frames:
            raise ValueError(
                f"motion.n_frames is {window}, and the {handle.name} prior sees {handle.most_frames} frames at most at "
                f"once: {_fewer_frames(recipe, handle.most_frames)}"
            )
    if n_frames is None or n_frames == window:
        return recipe
    steps = {handle.frame_step for handle in handles.values()}
    if len(steps) > 1:
        raise ValueError("the priors' autoencoders don't agree on frames: only takes of their own length can be made")
    most = int(MAX_LENGTH) * (window - 1) + 1
    if n_frames > most:
        raise ValueError(
            f"{n_frames} frames are more than {MAX_LENGTH:.0f} times as long as the {window} of the model: ask for "
            f"{most} at most"
        )
    return replace(recipe, n_frames=n_frames, windows=Windows(n_frames, window, *steps))


def _fewer_frames(recipe: MotionRecipe, most: int) -> str:
    """How to come to takes of no more frames: by another recipe where it is the recipe's own number."""
    shipped = shipped_recipe(recipe)
    if shipped is not None and shipped.n_frames > most:
        others = [one.name for one in MOTION_RECIPES.values() if one.n_frames <= most]
        return f"the recipe {recipe.name!r} is for other models, so choose {', '.join(others)}"
    return f"leave it at {most}, and ask for a longer animation by its number of frames"


def load_guidance(
    recipe: StaticRecipe | MotionRecipe,
    handles: Handles,
    prompt: str,
    runtime: Runtime,
    reference: Reference | None = None,
    negative: str = "",
    on_prior: Callable[[Prior], None] | None = None,
) -> dict[PriorKind, Guidance]:
    """Load the recipe's models and tell them the prompt, or the image where they see novel views.

    `negative`: see `choose_negative`. `on_prior` is told of every model as soon as it is loaded, before prompts are
    encoded, and is the one to release it; what it raises ends the loading.
    """
    view = None
    if reference is not None and recipe.reference is not None:
        view = ReferenceView(reference.over().movedim(-1, 0), reference_cameras(recipe.reference))
    guidance: dict[PriorKind, Guidance] = {}
    for term in active_terms(recipe):
        prior = handles[term.prior].load(runtime)
        if on_prior is not None:
            on_prior(prior)
        avoided = choose_negative(recipe, prior, negative)
        guidance[term.prior] = prior.guide(prompt, avoided, term.distillation, view)
    return guidance


def runtime_for(
    recipe: StaticRecipe | MotionRecipe, device: torch.device, accelerate: bool = True, compiled: bool = True
) -> Runtime:
    """How a recipe's models run on a device: fast on a GPU unless `accelerate` is off."""
    fast = device.type == "cuda" and accelerate
    return Runtime(device, working_dtype(recipe.loop, device), capture_for(device) if fast else PLAIN, fast, compiled)


def capture_for(device: torch.device) -> Capture:
    """What captures the models' work on a device, to be shared by those of a run."""
    if device.type != "cuda":
        return PLAIN
    if not has_own_allocator():
        logger.info(
            "no CUDA graphs: PyTorch leaves the GPU's memory to cudaMallocAsync (ComfyUI: start it with "
            "--disable-cuda-malloc to have them)"
        )
        return PLAIN
    return GraphCapture(device)


def choose_negative(recipe: StaticRecipe | MotionRecipe, prior: Prior, asked: str = "") -> str:
    """Return what a prior is told not to make: words that somebody chose, else its own, else the recipe's.

    Chosen are `asked` words, and those of a recipe that differ from the shipped recipe of its name. A toy prior has
    words of its own (none), because it doesn't know the usual ones.
    """
    shipped = shipped_recipe(recipe)
    if asked.strip():
        return asked.strip()
    if prior.negative_prompt is None or (shipped and shipped.negative_prompt != recipe.negative_prompt):
        return recipe.negative_prompt
    return prior.negative_prompt


def working_dtype(loop: LoopConfig, device: torch.device) -> torch.dtype:
    """The number format of the diffusion models: half precision on CUDA where the recipe asks for it."""
    return torch.float16 if loop.precision == "half" and device.type == "cuda" else torch.float32


def explain_silence(
    error: PriorSilent, recipe: StaticRecipe | MotionRecipe, handles: Handles, runtime: Runtime, full_precision: str
) -> PriorSilent:
    """The same error with the model's file and what can be done; `full_precision`: how to ask for it, in words."""
    what = "its weights are damaged, or it isn't a model of this kind: fetch it again, or choose another"
    if runtime.dtype == torch.float16:
        what = f"its numbers grow too large for half precision ({full_precision}), or {what}"
    model = next(handle.describe() for kind, handle in handles.items() if kind == error.prior)
    return PriorSilent(f"{error}. The model is {model}: {what}", error.prior)
