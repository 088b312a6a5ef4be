"""Make a still object from an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..training.config import StaticRecipe
from ..training.guidance import prompt_readers
from . import options as shared
from .command import Command
from .errors import UsageError
from .models import prior_handles
from .results import orbit_cameras
from .runs import ORBIT, SCENE, open_run
from .stages import film, keep_reference, new_still, read_reference, said, show, train_stage


@dataclass(frozen=True)
class ImageTo3D:
    image: shared.Image = None
    """An image of the object, cut out (with alpha); it is centred and brought to the size that the recipe wants."""
    prompt: Annotated[str | None, shared.TEXT] = None
    """What the image shows, for example "a red cube"; not needed with --static.guidance.1.weight 0."""
    maps: shared.Maps = shared.MapOptions()
    recipe: shared.ImageRecipe = "toy-image"
    seed: shared.Seed = 0
    steps: Annotated[int | None, shared.INT] = None
    """Training steps (default: the recipe's)."""
    novel_view_prior: shared.NovelViewPrior = None
    pixel_prior: shared.PixelPrior = None
    priors: shared.Priors = shared.PriorOptions()
    images: shared.Images = shared.ImageOptions()
    folders: shared.Folders = shared.FolderOptions()
    gpu: shared.Gpu = shared.GpuOptions()
    machine: shared.Machine = shared.MachineOptions()

    def __post_init__(self) -> None:
        shared.check_numbers(self)


def run(options: ImageTo3D, static: StaticRecipe) -> int:
    """Stage 1 alone, from an image."""
    reference = read_reference("image-to-3d", options, static)
    prompt = _prompt(static, options.prompt)
    handles = prior_handles(static, options, prompt)
    with open_run("image-to-3d", options, (static,), static.scene) as session:
        keep_reference(session, reference)
        path, begin = session.run.path / SCENE, lambda: new_still(session, static, reference)
        scene, _ = train_stage(session, static, handles, prompt, path, begin, reference)
        film(session, ORBIT, scene, orbit_cameras(options.images), prompt)
        show(session, scene, prompt, scene, reference, static.reference)
    return 0


def _prompt(recipe: StaticRecipe, prompt: str | None) -> str:
    """The prompt; empty only where no model of the recipe reads it."""
    readers = prompt_readers(recipe)
    if prompt is not None:
        return said(prompt, "--prompt")
    if not readers:
        return ""
    index = [term.prior for term in recipe.guidance].index(readers[0])
    raise UsageError(
        f"the {readers[0]} model wants to know what the image shows: say it with --prompt, or leave that model "
        f"out with --static.guidance.{index}.weight 0"
    )


COMMAND = Command(ImageTo3D, run, lambda options: (options, shared.image_recipe(options.recipe)))
