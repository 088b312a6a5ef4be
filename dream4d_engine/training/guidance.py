"""From a recipe and the places of its models to the guidance of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..guidance.distillation import Guidance
from ..machine import has_own_allocator
from ..priors.conditioning import image_guidance, text_guidance
from ..priors.loading import Prior, PriorExtras, PriorKind, load_prior_with
from ..priors.networks.denoisers import accelerated
from ..priors.networks.execution import PLAIN, Capture, GraphRecorder
from .config import GuidanceTerm, LoopConfig, MotionRecipe, StaticRecipe, shipped_recipe
from .loop import PriorSilent
from .reference import Reference, reference_cameras

logger = logging.getLogger(__name__)

Folders = Mapping[PriorKind, Path]


def active_terms(recipe: StaticRecipe | MotionRecipe) -> list[GuidanceTerm]:
    """The terms of a recipe that take part, and so need a model."""
    return [term for term in recipe.guidance if term.weight]


def load_guidance(
    recipe: StaticRecipe | MotionRecipe,
    folders: Folders,
    prompt: str,
    device: torch.device,
    reference: Reference | None = None,
    negative: str = "",
    on_prior: Callable[[Prior], None] | None = None,
    extras: Mapping[PriorKind, PriorExtras] | None = None,
    accelerate: bool = True,
    compiled: bool = True,
) -> dict[PriorKind, Guidance]:
    """Load the recipe's models and encode the prompts, or the image for a model of novel views.

    `negative`: see `choose_negative`. `on_prior` is told of every model as soon as it is loaded, before the prompts
    are encoded; what it raises ends the loading. `extras`: what is added to a model of a kind, or put in place of its
    parts. On a GPU the models run fast unless `accelerate` is off; `compiled`: some of them compiled.
    """
    guidance, capture = {}, capture_for(device)
    for term in active_terms(recipe):
        dtype = working_dtype(recipe.loop, device)
        added = (extras or {}).get(term.prior, PriorExtras())
        prior = load_prior_with(folders[term.prior], term.prior, device, dtype, added)
        if on_prior is not None:
            on_prior(prior)
        if term.prior == "novel_view":
            image, seen_by = reference.over().movedim(-1, 0), reference_cameras(recipe.reference)
            guidance[term.prior] = image_guidance(prior, image, seen_by, term.distillation)
            continue
        guidance[term.prior] = text_guidance(prior, prompt, choose_negative(recipe, prior, negative), term.distillation)
    if device.type == "cuda" and accelerate:
        return {kind: fast(one, capture, compiled) for kind, one in guidance.items()}
    return guidance


def capture_for(device: torch.device) -> Capture:
    """What records the models' work on a device, to be shared by those of a run."""
    if device.type != "cuda":
        return PLAIN
    if not has_own_allocator():
        logger.info(
            "no CUDA graphs: PyTorch leaves the GPU's memory to cudaMallocAsync (ComfyUI: start it with "
            "--disable-cuda-malloc to have them)"
        )
        return PLAIN
    return GraphRecorder(device)


def fast(guidance: Guidance, capture: Capture, compiled: bool = True) -> Guidance:
    """Return the guidance with its model running fast on a GPU (see priors.denoisers.accelerated)."""
    return replace(guidance, denoiser=accelerated(guidance.denoiser, capture, compiled))


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
    error: PriorSilent,
    recipe: StaticRecipe | MotionRecipe,
    folders: Folders,
    extras: Mapping[PriorKind, PriorExtras],
    device: torch.device,
    full_precision: str,
) -> PriorSilent:
    """The same error with the model's file and what can be done; `full_precision`: how to ask for it, in words."""
    added = extras.get(error.prior, PriorExtras())
    lora = added.image_lora if error.prior == "image" else None
    parts = [
        f" with the LoRA {lora}" if lora else "",
        f" with the autoencoder {added.tiny_vae}" if added.tiny_vae else "",
    ]
    what = "its weights are damaged, or it isn't a model of this kind: fetch it again, or choose another"
    if working_dtype(recipe.loop, device) == torch.float16:
        what = f"its numbers grow too large for half precision ({full_precision}), or {what}"
    return PriorSilent(f"{error}. The model is {folders[error.prior]}{''.join(parts)}: {what}", error.prior)
