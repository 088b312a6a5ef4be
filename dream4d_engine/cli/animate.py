"""Let the object of a scene file move as a sentence says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..assets import load_scene
from ..training.config import MOTION_RECIPES, MotionRecipe, find_recipe, for_mesh_scene, with_rigidity
from ..training.loop import ResumeMismatch
from . import options as shared
from .command import Command
from .errors import UsageError
from .models import prior_handles
from .results import final_cameras
from .runs import SCENE, VIDEO, open_run
from .stages import film, new_motion, of_frames, said, say_windows, show, train_stage


@dataclass(frozen=True)
class Animate:
    scene: Annotated[shared.Positional[str | None], shared.optional("SCENE")] = None
    """The scene file to animate."""
    prompt: shared.Prompt = None
    """What it does, for example "a red cube is jumping"."""
    recipe: Annotated[str, shared.arg(metavar="NAME")] = "toy"
    """toy; the published zeroscope-144x80, zeroscope-72x40, modelscope; model-video for any of today's models."""
    seed: shared.Seed = 0
    steps: Annotated[int | None, shared.INT] = None
    """Training steps (default: the recipe's)."""
    hifa_steps: Annotated[int | None, shared.INT] = None
    """Denoising steps of the targets: 4 move more steadily, at several times the cost (default: the recipe's)."""
    frames: shared.Frames = None
    gradient_frames: shared.GradientFrames = None
    deformation_scale: shared.DeformationScale = None
    motion_strength: shared.MotionStrength = None
    rigidity: Annotated[float | None, shared.FLOAT] = None
    """Keep the distances between near points of the object at this weight, so that it neither tears nor slips; 0 does
    not (default: the recipe's, or 1000 where it has none and the scene was made from a mesh)."""
    loop: shared.Loop = False
    video_prior: shared.VideoPrior = None
    priors: shared.Priors = shared.PriorOptions()
    images: shared.Images = shared.ImageOptions()
    folders: shared.Folders = shared.FolderOptions()
    gpu: shared.Gpu = shared.GpuOptions()
    machine: shared.Machine = shared.MachineOptions()

    def __post_init__(self) -> None:
        shared.check_numbers(self, shared.WHILE_TRAINED)


def run(options: Animate, motion: MotionRecipe) -> int:
    """Stage 2 on a scene from a file."""
    if options.scene is None:
        raise UsageError("say which scene to animate: dream4d animate SCENE PROMPT --out FOLDER")
    prompt = said(options.prompt, "the prompt")
    still, parent = load_scene(options.scene)
    motion = motion if parent.first_mesh is None else for_mesh_scene(motion)
    motion = motion if options.rigidity is None else with_rigidity(motion, options.rigidity)
    source = hashlib.sha256(Path(options.scene).read_bytes()).hexdigest()
    handles = prior_handles(motion, options, prompt)
    motion = of_frames(motion, handles, options.frames, "--frames")
    with open_run("animate", options, (motion,), still.config) as session:
        if session.run.record.setdefault("source", source) != source:
            raise ResumeMismatch(f"{options.scene} is not the scene any more that this run began with: start over")
        say_windows(session, motion)
        path, begin = session.run.path / SCENE, lambda: new_motion(session, motion, still)
        scene, _ = train_stage(session, motion, handles, prompt, path, begin, parent=parent)
        film(session, VIDEO, scene, final_cameras(options.images, scene), prompt)
        show(session, scene, prompt, of_a_mesh=parent.first_mesh is not None)
    return 0


COMMAND = Command(Animate, run, lambda options: (options, find_recipe(options.recipe, MOTION_RECIPES)))
