"""Make a moving object from a sentence: first the object, then its motion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..training.config import MotionRecipe, StaticRecipe
from . import options as shared
from .command import Command
from .stages import both_stages, said


@dataclass(frozen=True)
class TextTo4D:
    prompt: shared.Prompt = None
    """What to make and what it does, for example "a red cube is jumping"."""
    object_prompt: Annotated[str | None, shared.TEXT] = None
    """Another sentence for the first stage (default: the prompt)."""
    recipe: shared.TextRecipe = "toy"
    motion_recipe: Annotated[str | None, shared.optional("NAME")] = None
    """toy, zeroscope-144x80, zeroscope-72x40, modelscope, or model-video for any of today's models (default: toy;
    zeroscope-144x80 for text-to-3d; model-video for model-image)."""
    seed: shared.Seed = 0
    steps: Annotated[int | None, shared.INT] = None
    """Training steps of the first stage (default: the recipe's)."""
    motion_steps: Annotated[int | None, shared.INT] = None
    """Training steps of the second stage (default: the recipe's)."""
    sd_view: shared.SdView = None
    hifa_steps: shared.HifaSteps = None
    motion_frames: shared.Frames = None
    gradient_frames: shared.GradientFrames = None
    deformation_scale: shared.DeformationScale = None
    loop: shared.Loop = False
    motion_strength: shared.MotionStrength = None
    multiview_prior: shared.MultiviewPrior = None
    image_prior: shared.ImagePrior = None
    video_prior: shared.VideoPrior = None
    lora: shared.Lora = shared.LoraOptions()
    priors: shared.Priors = shared.PriorOptions()
    images: shared.Images = shared.ImageOptions()
    folders: shared.Folders = shared.FolderOptions()
    gpu: shared.Gpu = shared.GpuOptions()
    machine: shared.Machine = shared.MachineOptions()

    def __post_init__(self) -> None:
        shared.check_numbers(self, shared.WHILE_TRAINED)


def run(options: TextTo4D, static: StaticRecipe, motion: MotionRecipe) -> int:
    """Both stages."""
    return both_stages("text-to-4d", options, static, motion, said(options.prompt, "the prompt"))


COMMAND = Command(TextTo4D, run, lambda options: shared.with_motion(options, shared.text_recipe(options.recipe)))
