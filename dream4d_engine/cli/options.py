"""What several commands share of their flags, and of the recipes that these name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tyro.conf import Positional, UseAppendAction, arg

from ..documents import named
from ..fields.edit import MOST_STRENGTH, Box, MotionEdit, TimeMap, parse_box, parse_keys
from ..fields.stencil import stencil
from ..machine import keep_freed_memory, pick_device
from ..scene import MAX_SAMPLES, Scene
from ..training.config import (
    IMAGE_RECIPES,
    MOTION_RECIPES,
    ORBIT_RECIPES,
    STATIC_RECIPES,
    TRAINED_STRENGTHS,
    MotionRecipe,
    StaticRecipe,
    find_recipe,
    is_toy,
)
from ..training.processes import Share
from ..training.reference.masks import read_mask
from ..training.reference.pixels import file_pixels
from .errors import UsageError
from .terminal import say


def optional(metavar: str, text: str | None = None) -> Any:
    """How a flag without a value of its own is shown; its default is said in words, not as None."""
    return arg(metavar=metavar, help_behavior_hint="", help=text)


Flat = arg(name="")  # the group's fields appear as flags without a prefix
FOLDER, FILE, MODEL, TEXT, INT, FLOAT = map(optional, ("FOLDER", "FILE", "MODEL", "TEXT", "INT", "FLOAT"))

Image = Annotated[Positional[str | None], optional("IMAGE")]
Prompt = Annotated[Positional[str | None], optional("PROMPT")]
Seed = Annotated[int, arg(help="Everything random follows from it.")]

# the recipes' names, and the shorthands for numbers of theirs
TextRecipe = Annotated[
    str,
    arg(
        metavar="NAME",
        help="toy (small models that come with the package) or text-to-3d (the published settings); model-image for "
        "any\nof today's models of images; toy-personalised and personalised-3d for a subject of your own: its word "
        '"sks"\nis told to the image model alone.',
    ),
]
ImageRecipe = Annotated[
    str,
    arg(
        metavar="NAME",
        help="toy-image (small models that come with the package) or image-to-3d (the published settings).",
    ),
]
SdView = Annotated[
    float | None,
    optional(
        "FLOAT",
        "Ask the image model only for views less than so many degrees from the front: 180 all, 145 spares the back and"
        "\nlessens two-faced results (default: the recipe's).",
    ),
]
HifaSteps = Annotated[
    int | None,
    optional(
        "INT",
        "Denoising steps of the second stage's targets: 4 move more steadily, at several times the cost (default: the"
        "\nrecipe's).",
    ),
]
GradientFrames = Annotated[
    int | None,
    optional(
        "INT",
        "Frames of a take, at most, that carry gradient in a step of the second stage: fewer take less memory and make"
        "\nthe steps noisier; 0 is all (default: the recipe's).",
    ),
]
MotionStrength = Annotated[
    float | None,
    optional(
        "FLOAT",
        "How many times as far things go as the video model is shown: 0.25 to 2, 1 as it asks for (default: the"
        "\nrecipe's).",
    ),
]
DeformationScale = Annotated[
    float | None,
    optional("FLOAT", "Zoom of the object into the frame (default: chosen from the object's size)."),
]
Loop = Annotated[
    bool, arg(help="Let the motion end where it begins, so that video and GLB can be played again and again.")
]

Frames = Annotated[
    int | None,
    optional(
        "INT",
        "Frames of the animation that is trained. More than the video model's own (toy: 8) are seen through overlapping"
        "\nwindows of time: 24 last three times as long, and take four times the work (default: the model's own).",
    ),
]

MultiviewPrior = Annotated[
    str | None, optional("MODEL", "Multi-view model (default with the recipe toy: the one in the package).")
]
ImagePrior = Annotated[str | None, optional("MODEL", "Text-to-image model.")]
VideoPrior = Annotated[
    str | None, optional("MODEL", "Text-to-video model (default with the recipe toy: the one in the package).")
]
NovelViewPrior = Annotated[
    str | None, optional("MODEL", "Novel-view model (default with the recipe toy-image: the one in the package).")
]
PixelPrior = Annotated[
    str | None, optional("MODEL", "Text-to-pixels model (default with the recipe toy-image: the one in the package).")
]


MOST_FRAMES, MOST_SIDE = 100_000, 8192
"""Of a video: more is a slip of the finger, found out after the training; H.264 has no much larger images."""
_RANGES = {
    "seed": (0, 2**63 - 1),
    "steps": (1, 10**9),
    "motion_steps": (1, 10**9),
    "warmup": (0, 10**9),
    "sd_view": (0.1, 180),
    "hifa_steps": (1, 1000),
    "gradient_frames": (0, 10**6),
    "rigidity": (0, 10**9),
    "image_lora_strength": (-10, 10),
    "size": (1, MOST_SIDE),
    "frames": (1, MOST_FRAMES),
    "motion_frames": (1, MOST_FRAMES),
    "orbit_frames": (1, MOST_FRAMES),
    "part_frames": (1, MOST_FRAMES // 8),
    "fps": (0.1, 1000),
    "samples": (1, MAX_SAMPLES),
    "azimuth_deg": (-36000, 36000),
    "elevation_deg": (-90, 90),
    "distance": (0.001, 10_000),
    "fov_y_deg": (0.1, 179.9),
    "time": (0, 1),
    "times": (1, 1000),
    "resolution": (8, 1024),
    "faces": (0, 10**7),
    "threshold": (1e-6, 1e8),
    "smoothing": (0, 100),
    "texture": (0, 8192),
    "duration": (0.01, 3600),
    "error": (1e-6, 1),
    "motion_strength": (0, MOST_STRENGTH),
    "freeze_border": (0.001, 1000),
    "speed": (0.01, 100),
    "workers": (1, 1024),
    "retries": (0, 100),
}
"""What the numbers of all commands keep to, by the fields' names; the recipes' own are checked with the recipe."""
WHILE_TRAINED = {"motion_strength": TRAINED_STRENGTHS}
"""Likewise, of the commands that train a motion."""


def check_numbers(options: object, others: Mapping[str, tuple[float, float]] | None = None) -> None:
    """Refuse a number out of its range, as soon as it is typed; `others`: ranges that are this command's own."""
    for name, (low, high) in (_RANGES | dict(others or {})).items():
        given = getattr(options, name, None)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie in [{low}, {high}], got {value}")


@dataclass(frozen=True)
class MachineOptions:
    """What the run uses of the machine."""

    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: Annotated[int | None, INT] = None
    """CPU threads (default: one for each core)."""
    debug: bool = False
    """Show the whole traceback of an error."""


@dataclass(frozen=True)
class EditOptions:
    """What is changed of a scene's motion."""

    motion_strength: float = 1.0
    """How far things go: 0 is still, 1 as trained, up to 2. Beyond 1.5 the motion may tear."""
    freeze: Annotated[tuple[str, ...], arg(metavar="X0,Y0,Z0,X1,Y1,Z1"), UseAppendAction] = ()
    """A box of the scene at rest that keeps still, by its lower and its upper corner."""
    freeze_mask: Annotated[Path | None, FILE] = None
    """An image: what lies behind its white keeps still, seen from the front as `render --path fixed` shows it."""
    freeze_border: float = Box.border
    """How far beside what is frozen the motion sets in."""
    speed: float = 1.0
    """Plays of the animation in the time of one."""
    ping_pong: bool = False
    """A play goes there and back."""
    remap: Annotated[str | None, optional("OUT:IN,...")] = None
    """Which moments of the animation a play shows when: pairs of times from 0 to 1, linear between, as
    0:0,0.5:0.2,1:1."""

    def __post_init__(self) -> None:
        check_numbers(self)
        with named("--freeze"):
            MotionEdit(frozen=tuple(parse_box(text, self.freeze_border) for text in self.freeze))
        with named("--remap"):
            TimeMap(keys=parse_keys(self.remap or ""))
        if self.freeze_border != Box.border and not self.freezes:
            raise ValueError("--freeze-border means nothing without --freeze or --freeze-mask: leave it out")

    @property
    def freezes(self) -> bool:
        """Whether something is to keep still."""
        return bool(self.freeze) or self.freeze_mask is not None

    def edit(self) -> tuple[MotionEdit, str]:
        """The change, and what is to be said of its mask or "". ValueError where the mask can't be one."""
        masks, note = [], ""
        if self.freeze_mask is not None:
            with file_pixels(self.freeze_mask, "mask") as pixels:
                read = read_mask(pixels)
            with named(f"--freeze-mask {self.freeze_mask}"):
                masks.append(stencil(read.white, self.freeze_border))
            note = read.note
        boxes = tuple(parse_box(text, self.freeze_border) for text in self.freeze)
        time = TimeMap(self.speed, self.ping_pong, parse_keys(self.remap or ""))
        return MotionEdit(self.motion_strength, boxes, tuple(masks), (time,)), note


@dataclass(frozen=True)
class GpuOptions:
    """How GPUs are used; results don't depend on it, but for `share`."""

    memory_budget: Annotated[str | None, optional("SIZE")] = None
    """Keep to so much GPU memory, for example 10GiB: the fastest way to run the models that fits is chosen."""
    compile: bool = True
    """Compile parts of the models before the first step, which takes a minute the first time and pays after a few."""
    share: Share = "cameras"
    """What the processes of torchrun share. cameras: each has as many as the recipe says, so a step has more. work:
    each step is divided among them and done sooner. auto: the work, where a step has an image for each."""


@dataclass(frozen=True)
class FolderOptions:
    """Where results go."""

    out: Annotated[str | None, FOLDER] = None
    """Folder for the results; made if needed."""
    resume: Annotated[str | None, FOLDER] = None
    """Go on with the unfinished run in this folder; its settings need not be given again."""
    overwrite: bool = False
    """Replace the results that --out already holds."""
    dry_run: bool = False
    """Check the settings, files and models of the run, and stop before anything is made or written."""


@dataclass(frozen=True)
class PriorOptions:
    """Where the models come from. MODEL is a folder in diffusers' format, a checkpoint, or a hub id."""

    download: bool = False
    """Fetch a model that is named by a hub id (or an id that `dream4d priors` lists) and is not here yet."""
    tiny_vae: Annotated[str | None, FOLDER] = None
    """AutoencoderTiny that takes the place of the models' own autoencoder: less memory, coarser images."""
    tiny_decoder: Annotated[str | None, FOLDER] = None
    """AutoencoderTiny that takes the place of the decoder alone, which makes what colours are compared with: encoding,
    and the gradient through it, stay as they are."""


@dataclass(frozen=True)
class LoraOptions:
    """What is added to the text-to-image model."""

    image_lora: Annotated[str | None, FILE] = None
    """LoRA (DreamBooth's, say) for the text-to-image model; its subject is "sks" in the prompt. "toy" is the one in the
    package, of "a sks snowman", for --recipe toy-personalised."""
    image_lora_strength: float = 1.0
    """How much of it."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class MapOptions:
    """What is known of the image beside its colours."""

    mask: Annotated[str | None, FILE] = None
    """Image of the same size, black and white (default: the image's alpha)."""
    mask_shows: Annotated[Literal["automatic", "subject", "background"], arg(metavar="PART")] = "automatic"
    """What is white in --mask: subject, background, or automatic, which tells it by what lies under the mask and where,
    and asks where that can't be told."""
    depth_map: Annotated[str | None, FILE] = None
    """Grey image of the same size, bright where the object is near (--static.reference.depth-near); it needs
    --static.reference.depth or .relative-depth above 0."""
    normal_map: Annotated[str | None, FILE] = None
    """Image of the same size with the camera's normals as colours (red to the right, green up, blue towards the
    camera); it needs --static.reference.normal above 0."""


@dataclass(frozen=True)
class ImageOptions:
    """The videos and images made of the result."""

    size: int = 128
    """Height and width of the videos, pixels."""
    orbit_frames: int = 48
    """Frames of the turn around the still object."""
    part_frames: int = 24
    """Frames of each of the final video's 8 parts: still and orbiting camera in turns, the animation once in each. A
    longer animation has as many times more."""
    fps: float = 24.0
    """Frames per second."""
    samples: Annotated[int | None, INT] = None
    """Samples along a ray (default: the scene's own)."""

    def __post_init__(self) -> None:
        check_numbers(self)


Lora = Annotated[LoraOptions, Flat]
Maps = Annotated[MapOptions, Flat]
Priors = Annotated[PriorOptions, Flat]
Images = Annotated[ImageOptions, Flat]
Folders = Annotated[FolderOptions, Flat]
Gpu = Annotated[GpuOptions, Flat]
Edit = Annotated[EditOptions, Flat]
Machine = Annotated[MachineOptions, Flat]

RunOptions = Any
"""Options of a command that trains: prompt, seed, priors, images, folders, gpu and machine, named so in all of them."""
Recipe = StaticRecipe | MotionRecipe


def use_machine(options: MachineOptions) -> None:
    """Refuse a device that is not there, whatever the command; set the number of threads, keep freed memory."""
    pick_device(options.device)
    keep_freed_memory()
    most = max(64, os.cpu_count() or 1)  # torch takes any number, and dies where the system has no more threads
    if options.threads is None:
        return
    if not 1 <= options.threads <= most:
        raise ValueError(f"--threads must lie in [1, {most}], got {options.threads}: one for each core is best")
    torch.set_num_threads(options.threads)


def edited(scene: Scene, options: EditOptions) -> tuple[Scene, str]:
    """The scene with its motion changed, and in words what was changed, "" for nothing."""
    edit, note = options.edit()
    if note:
        say(f"note: {note}")
    if edit.is_nothing:
        return scene, ""
    if scene.deformation is None:
        raise UsageError("the scene doesn't move, so there is no motion to change: animate it first")
    return scene.edited(edit), edit.in_words()


def text_recipe(name: str) -> StaticRecipe:
    """A recipe that starts from a sentence."""
    if name in IMAGE_RECIPES:
        raise UsageError(f"the recipe {name!r} starts from an image: use dream4d image-to-3d or image-to-4d")
    return find_recipe(name, STATIC_RECIPES)


def image_recipe(name: str) -> StaticRecipe:
    """A recipe that starts from an image."""
    if name in STATIC_RECIPES:
        raise UsageError(f"the recipe {name!r} starts from a sentence: use dream4d text-to-3d or text-to-4d")
    if name in ORBIT_RECIPES:
        raise UsageError(
            f"the recipe {name!r} is for SV3D, which is read in ComfyUI alone, by the node Novel-View Prior from "
            f"Model: choose one of {', '.join(IMAGE_RECIPES)}"
        )
    return find_recipe(name, IMAGE_RECIPES)


def with_motion(options: RunOptions, static: StaticRecipe) -> tuple[RunOptions, StaticRecipe, MotionRecipe]:
    """Add the second stage's recipe; where none is named, the one that goes with the first stage's."""
    usual = {"model-image": "model-video"}.get(static.name, "toy" if is_toy(static) else "zeroscope-144x80")
    name = options.motion_recipe or usual
    return replace(options, motion_recipe=name), static, find_recipe(name, MOTION_RECIPES)
