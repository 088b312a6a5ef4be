"""Which diffusion models a recipe needs, and where they are."""

from __future__ import annotations

from pathlib import Path

from ..priors.conditioning import words_for
from ..priors.loading import check_prompt, load_prior, read_json, toy_folder
from ..training.config import MotionRecipe, PriorKind, StaticRecipe, is_toy
from ..training.guidance import Folders, active_terms


def prior_folders(recipe: StaticRecipe | MotionRecipe, options: object, toys: bool = False) -> dict[PriorKind, Path]:
    """Return the folder of every model that the recipe's terms need.

    `options` has them as multiview_prior, image_prior and so on; toy recipes (or `toys`) fall back to the models in
    the package.
    """
    found: dict[PriorKind, Path] = {}
    for term in active_terms(recipe):
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


def check_words(folders: Folders, prompt: str) -> None:
    """Say before any work is done that a toy model wasn't taught a word of the prompt."""
    for kind, folder in folders.items():
        if kind == "novel_view":  # it is told a picture
            continue
        if "known_words" in read_json(folder, "model_index.json").get("dream4d", {}):  # such models load at once
            check_prompt(load_prior(folder, kind), words_for(kind, prompt))
