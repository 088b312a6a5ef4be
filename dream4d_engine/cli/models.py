"""Which diffusion models a recipe needs, and where they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ..documents import named
from ..priors.files import PriorFiles, prior_files, toy_prior, toy_subject
from ..priors.formats.folders import FolderLoader
from ..priors.formats.identify import open_loader
from ..priors.formats.lora_files import read_lora
from ..priors.formats.pipelines import PipelineFolder, open_pipeline
from ..priors.formats.tiny_vae import TinyDecoder, tiny_config
from ..priors.formats.weights import find_weights
from ..priors.handle import PriorKind
from ..priors.lora import check_strength
from ..training.config import IMAGE_RECIPES, MOTION_RECIPES, STATIC_RECIPES, is_toy
from ..training.guidance import active_terms
from .errors import UsageError
from .options import PriorOptions, Recipe
from .terminal import say

_RECIPES: tuple[Recipe, ...] = (*STATIC_RECIPES.values(), *IMAGE_RECIPES.values(), *MOTION_RECIPES.values())


class WithPriors(Protocol):
    """Options that say where the models come from."""

    @property
    def priors(self) -> PriorOptions: ...


def prior_handles(
    recipe: Recipe, options: WithPriors, prompt: str | None = None, toys: bool = False
) -> dict[PriorKind, PriorFiles]:
    """Return the models that the recipe's terms need, after a look at every file that is named.

    `options` has them as multiview_prior, image_prior and so on; toy recipes (or `toys`) fall back to the models in
    the package. A hub id is looked for among what was downloaded before, or downloaded if the options say so.
    `prompt`: what they will be told; PriorError where a toy model wasn't taught a word of it.
    """
    added = _added(options)  # says in time what is wrong with them
    tiny_vae = _tiny_vae(options.priors)
    if not toys:
        _check_asked(recipe, options)
    found: dict[PriorKind, PriorFiles] = {}
    for term in active_terms(recipe):
        given = getattr(options, f"{term.prior}_prior", None)
        if given is None and not is_toy(recipe) and not toys:
            raise ValueError(
                f"the recipe {recipe.name!r} needs a model of kind {term.prior!r}: give its folder, checkpoint or hub "
                f"id with --{term.prior.replace('_', '-')}-prior MODEL, or take one of the toy recipes"
            )
        handle = toy_prior(term.prior) if given is None else _find(given, term.prior, options)
        # a decoder makes what colours are compared with, and nothing else
        asked = not isinstance(tiny_vae, TinyDecoder) or term.distillation.color_weight > 0
        asked = asked and (tiny_vae is None or handle.encodes())
        found[term.prior] = replace(handle, **added.get(term.prior, {}), tiny_vae=tiny_vae if asked else None)
        found[term.prior].check_added()
        if given is not None and is_toy(recipe) and open_pipeline(handle.path) is not None:
            flag = "--motion-recipe" if hasattr(options, "motion_recipe") and term.prior == "video" else "--recipe"
            raise ValueError(
                f"the recipe {recipe.name!r} is made for the package's own small models, {handle.name} is one of "
                f"today's: give {flag} {'model-video' if term.prior == 'video' else 'model-image'}"
            )
    if tiny_vae is not None and not any(handle.tiny_vae for handle in found.values()):
        decodes = any(term.distillation.color_weight > 0 for term in active_terms(recipe))
        why = f"the recipe {recipe.name!r} decodes nothing"
        if decodes or not isinstance(tiny_vae, TinyDecoder):
            why = f"no model that the recipe {recipe.name!r} asks has an autoencoder"
        flag = "--tiny-decoder" if isinstance(tiny_vae, TinyDecoder) else "--tiny-vae"
        say(f"note: {why}, {flag} is left out of it", error=True)
    if prompt is not None:
        for handle in found.values():
            handle.check_prompt(prompt)
    return found


def _check_asked(recipe: Recipe, options: WithPriors) -> None:
    """Refuse a model that a stage's recipe never asks: it would be left out without a word."""
    kinds: tuple[PriorKind, ...] = (
        ("video",) if recipe.stage == "motion" else ("multiview", "image", "novel_view", "pixel")
    )
    for kind in set(kinds) - {term.prior for term in recipe.guidance}:
        if getattr(options, f"{kind}_prior", None) is not None:
            known = [r.name for r in _RECIPES if any(term.prior == kind for term in r.guidance)]
            raise ValueError(
                f"the recipe {recipe.name!r} asks no model of kind {kind!r}, --{kind.replace('_', '-')}-prior would be "
                f"left out: leave it away, or take a recipe that asks one ({', '.join(known)})"
            )


def _find(given: str, kind: PriorKind, options: WithPriors) -> PriorFiles:
    """Return a model after a look at what it is."""
    path = find_weights(given, download=options.priors.download, say=lambda text: say(text, error=True))
    folder = open_pipeline(path)
    checked = folder or open_loader(path)
    if isinstance(checked, FolderLoader | PipelineFolder):
        checked.check()
    for note in checked.metadata(kind).notes:
        say(f"note: {note}", error=True)
    return prior_files(path, kind)


def _tiny_vae(priors: PriorOptions) -> Path | TinyDecoder | None:
    """What takes the autoencoder's place, or its decoder's, after a look at what it is."""
    if priors.tiny_vae is not None and priors.tiny_decoder is not None:
        raise UsageError("--tiny-vae decodes, too: leave --tiny-decoder away")
    for flag, folder in (("--tiny-vae", priors.tiny_vae), ("--tiny-decoder", priors.tiny_decoder)):
        if folder is not None:
            with named(flag):
                tiny_config(folder)
    if priors.tiny_decoder is not None:
        return TinyDecoder(Path(priors.tiny_decoder))
    return None if priors.tiny_vae is None else Path(priors.tiny_vae)


def _added(options: WithPriors) -> dict[PriorKind, dict[str, Any]]:
    """Return what the options add to the models, as fields of PriorFiles, after a look at the files."""
    lora = getattr(options, "lora", None)
    if lora is None or lora.image_lora is None:
        return {}
    path = toy_subject() if lora.image_lora == "toy" else Path(lora.image_lora)
    check_strength(lora.image_lora_strength)
    read_lora(path)
    return {"image": {"lora": path, "lora_strength": lora.image_lora_strength}}
