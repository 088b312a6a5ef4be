"""Which diffusion models a recipe needs, and where they are."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from ..priors.conditioning import words_for
from ..priors.formats.folders import FolderLoader
from ..priors.formats.identify import identify, open_loader
from ..priors.formats.lora_files import read_lora
from ..priors.formats.weights import find_weights
from ..priors.loading import PriorError, PriorExtras, check_prompt, load_prior, toy_folder, toy_subject
from ..priors.lora import check_strength
from ..training.config import MotionRecipe, PriorKind, StaticRecipe, is_toy
from ..training.guidance import Folders, active_terms
from .terminal import say


def prior_folders(recipe: StaticRecipe | MotionRecipe, options: object, toys: bool = False) -> dict[PriorKind, Path]:
    """Return where every model is that the recipe's terms need: a folder or a file.

    `options` has them as multiview_prior, image_prior and so on; toy recipes (or `toys`) fall back to the models in
    the package. A hub id is looked for among what was downloaded before, or downloaded if the options say so.
    """
    prior_extras(options)  # says in time what is wrong with them
    found: dict[PriorKind, Path] = {}
    for term in active_terms(recipe):
        given = getattr(options, f"{term.prior}_prior", None)
        if given is None and not is_toy(recipe) and not toys:
            raise ValueError(
                f"the recipe {recipe.name!r} needs a model of kind {term.prior!r}: give its folder, checkpoint or hub "
                f"id with --{term.prior.replace('_', '-')}-prior MODEL, or take one of the toy recipes"
            )
        found[term.prior] = toy_folder(term.prior) if given is None else _find(given, term.prior, options)
    return found


def _find(given: str, kind: PriorKind, options: object) -> Path:
    """Return where a model is, after a look at what it is."""
    path = find_weights(given, download=options.priors.download, say=lambda text: say(text, error=True))
    source = open_loader(path)
    if isinstance(source, FolderLoader):
        source.check()
    for note in source.metadata(kind).notes:
        say(f"note: {note}", error=True)
    return path


def prior_extras(options: object) -> dict[PriorKind, PriorExtras]:
    """Return what the options add to the models, after a look at the files."""
    lora, tiny_vae = getattr(options, "lora", None), options.priors.tiny_vae
    if tiny_vae is not None and identify(tiny_vae).layout != "tiny autoencoder":
        raise PriorError(f"--tiny-vae {tiny_vae} is no AutoencoderTiny")
    extras = dict.fromkeys(get_args(PriorKind), PriorExtras(tiny_vae=tiny_vae))
    if lora is not None and lora.image_lora is not None:
        path = toy_subject() if lora.image_lora == "toy" else Path(lora.image_lora)
        check_strength(lora.image_lora_strength)
        read_lora(path)
        extras["image"] = PriorExtras(path, lora.image_lora_strength, tiny_vae)
    return extras


def check_words(folders: Folders, prompt: str) -> None:
    """Say before any work is done that a toy model wasn't taught a word of the prompt."""
    for kind, folder in folders.items():
        if kind == "novel_view":  # it is told an image
            continue
        if open_loader(folder).metadata(kind).known_words is not None:  # such models load at once
            check_prompt(load_prior(folder, kind), words_for(kind, prompt))
