"""Which diffusion models a recipe needs, where they are, and their guidance by a prompt or a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..guidance.distillation import Guidance
from ..priors.conditioning import image_guidance, text_guidance, words_for
from ..priors.loading import check_prompt, load_prior, read_json, toy_folder
from ..training.config import GuidanceTerm, LoopConfig, MotionRecipe, PriorKind, StaticRecipe, is_toy
from ..training.reference import Reference, reference_cameras

Folders = Mapping[PriorKind, Path]


def prior_folders(recipe: StaticRecipe | MotionRecipe, options: object, toys: bool = False) -> dict[PriorKind, Path]:
    """Return the folder of every model that the recipe's terms need.

    `options` has them as multiview_prior, image_prior and so on; toy recipes (or `toys`) fall back to the models in
    the package.
    """
    found: dict[PriorKind, Path] = {}
    for term in _terms(recipe):
        given = getattr(options, f"{term.prior}_prior", None)
        if given is None and not is_toy(recipe) and not toys:
            raise ValueError(
                f"the recipe {recipe.name!r} needs a model of kind {term.prior!r}: "
                f"give its folder with --{term.prior.replace('_', '-')}-prior FOLDER, or take one of the toy recipes"
            )
        folder = toy_folder(term.prior) if given is None else Path(given)
        read_json(folder, "model_index.json")  # says in time what is wrong with the folder
        found[term.prior] = folder
    return found


def _terms(recipe: StaticRecipe | MotionRecipe) -> list[GuidanceTerm]:
    return [term for term in recipe.guidance if term.weight]


def check_words(folders: Folders, prompt: str) -> None:
    """Say before any work is done that a toy model wasn't taught a word of the prompt."""
    for kind, folder in folders.items():
        if kind == "novel_view":  # it is told a picture
            continue
        if "known_words" in read_json(folder, "model_index.json").get("dream4d", {}):  # such models load at once
            check_prompt(load_prior(folder, kind), words_for(kind, prompt))


def load_guidance(
    recipe: StaticRecipe | MotionRecipe,
    folders: Folders,
    prompt: str,
    device: torch.device,
    reference: Reference | None = None,
) -> dict[PriorKind, Guidance]:
    """Load the recipe's models and encode the prompts, or the picture for a model of novel views."""
    guidance = {}
    for term in _terms(recipe):
        prior = load_prior(folders[term.prior], term.prior, device, _dtype(recipe.loop, device))
        if term.prior == "novel_view":
            picture, seen_by = reference.over().movedim(-1, 0), reference_cameras(recipe.reference)
            guidance[term.prior] = image_guidance(prior, picture, seen_by, term.distillation)
            continue
        negative = recipe.negative_prompt
        if prior.known_words is not None and prior.negative_prompt is not None:
            negative = prior.negative_prompt  # a toy model doesn't know the words of the usual one
        guidance[term.prior] = text_guidance(prior, prompt, negative, term.distillation)
    return guidance


def _dtype(loop: LoopConfig, device: torch.device) -> torch.dtype:
    return torch.float16 if loop.precision == "half" and device.type == "cuda" else torch.float32
