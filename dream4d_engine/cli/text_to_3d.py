"""Make a still object from a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..training.config import StaticRecipe
from . import options as shared
from .command import Command
from .models import prior_handles
from .results import orbit_cameras
from .runs import ORBIT, SCENE, open_run
from .stages import film, new_still, said, show, train_stage


@dataclass(frozen=True)
class TextTo3D:
    prompt: shared.Prompt = None
    """What to make, for example "a red cube"."""
    recipe: shared.TextRecipe = "toy"
    seed: shared.Seed = 0
    steps: Annotated[int | None, shared.INT] = None
    """Training steps (default: the recipe's)."""
    sd_view: shared.SdView = None
    multiview_prior: shared.MultiviewPrior = None
    image_prior: shared.ImagePrior = None
    lora: shared.Lora = shared.LoraOptions()
    priors: shared.Priors = shared.PriorOptions()
    images: shared.Images = shared.ImageOptions()
    folders: shared.Folders = shared.FolderOptions()
    gpu: shared.Gpu = shared.GpuOptions()
    machine: shared.Machine = shared.MachineOptions()

    def __post_init__(self) -> None:
        shared.check_numbers(self)


def run(options: TextTo3D, static: StaticRecipe) -> int:
    """Stage 1 alone."""
    prompt = said(options.prompt, "the prompt")
    handles = prior_handles(static, options, prompt)
    with open_run("text-to-3d", options, (static,), static.scene) as session:
        path = session.run.path / SCENE
        scene, _ = train_stage(session, static, handles, prompt, path, lambda: new_still(session, static))
        film(session, ORBIT, scene, orbit_cameras(options.images), prompt)
        show(session, scene, prompt)
    return 0


COMMAND = Command(TextTo3D, run, lambda options: (options, shared.text_recipe(options.recipe)))
