"""Make a moving object from an image: first the object, then its motion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..training.config import MotionRecipe, StaticRecipe
from . import options as shared
from .command import Command
from .stages import both_stages, read_reference, said


@dataclass(frozen=True)
class ImageTo4D:
    image: shared.Image = None
    """An image of the object, cut out (with alpha); it is centred and brought to the size that the recipe wants."""
    prompt: Annotated[str | None, shared.TEXT] = None
    """What the image shows and what it does, for example "a red cube is jumping"."""
    maps: shared.Maps = shared.MapOptions()
    recipe: shared.ImageRecipe = "toy-image"
    object_prompt: Annotated[str | None, shared.TEXT] = None
    """Another sentence for the first stage (default: the prompt)."""
    motion_recipe: Annotated[str | None, shared.optional("NAME")] = None
    """toy, zeroscope-144x80, zeroscope-72x40, modelscope, or model-video for any of today's models (default: toy;
    zeroscope-144x80 for image-to-3d)."""
    seed: shared.Seed = 0
    steps: Annotated[int | None, shared.INT] = None
    """Training steps of the first stage (default: the recipe's)."""
    motion_steps: Annotated[int | None, shared.INT] = None
    """Training steps of the second stage (default: the recipe's)."""
    hifa_steps: shared.HifaSteps = None
    motion_frames: shared.Frames = None
    gradient_frames: shared.GradientFrames = None
    deformation_scale: shared.DeformationScale = None
    loop: shared.Loop = False
    motion_strength: shared.MotionStrength = None
    novel_view_prior: shared.NovelViewPrior = None
    pixel_prior: shared.PixelPrior = None
    video_prior: shared.VideoPrior = None
    priors: shared.Priors = shared.PriorOptions()
    images: shared.Images = shared.ImageOptions()
    folders: shared.Folders = shared.FolderOptions()
    gpu: shared.Gpu = shared.GpuOptions()
    machine: shared.Machine = shared.MachineOptions()

    def __post_init__(self) -> None:
        shared.check_numbers(self, shared.WHILE_TRAINED)


def run(options: ImageTo4D, static: StaticRecipe, motion: MotionRecipe) -> int:
    """Both stages, the first one from an image."""
    reference = read_reference("image-to-4d", options, static)
    return both_stages("image-to-4d", options, static, motion, said(options.prompt, "--prompt"), reference)


COMMAND = Command(ImageTo4D, run, lambda options: shared.with_motion(options, shared.image_recipe(options.recipe)))
