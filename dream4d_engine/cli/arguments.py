"""What can be typed: one frozen dataclass a command; the recipes' own fields become flags beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..scene import MAX_SAMPLES
from ..training.config import MotionRecipe, StaticRecipe

# help_behavior_hint: the default of these is said in words, not as None
Flat = tyro.conf.arg(name="")  # the group's fields appear as flags without a prefix
_FOLDER = tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")
_MODEL = tyro.conf.arg(metavar="MODEL", help_behavior_hint="")
_FILE = tyro.conf.arg(metavar="FILE", help_behavior_hint="")
_TEXT = tyro.conf.arg(metavar="TEXT", help_behavior_hint="")
_INT = tyro.conf.arg(metavar="INT", help_behavior_hint="")
_FLOAT = tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")

Image = Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="IMAGE", help_behavior_hint="")]
Prompt = Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="PROMPT", help_behavior_hint="")]
SceneFile = Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="SCENE", help_behavior_hint="")]


MOST_FRAMES, MOST_SIDE = 100_000, 8192
"""Of a video: more is a slip of the finger, found out after the training; H.264 has no much larger images."""
_RANGES = {
    "seed": (0, 2**63 - 1),
    "steps": (1, 10**9),
    "motion_steps": (1, 10**9),
    "warmup": (0, 10**9),
    "sd_view": (0.1, 180),
    "hifa_steps": (1, 1000),
    "image_lora_strength": (-10, 10),
    "size": (1, MOST_SIDE),
    "frames": (1, MOST_FRAMES),
    "orbit_frames": (1, MOST_FRAMES),
    "part_frames": (1, MOST_FRAMES // 8),
    "fps": (0.1, 1000),
    "samples": (1, MAX_SAMPLES),
    "azimuth_deg": (-36000, 36000),
    "elevation_deg": (-90, 90),
    "distance": (0.001, 10_000),
    "fov_y_deg": (0.1, 179.9),
    "time": (0, 1),
}
"""What the numbers of all commands keep to, by the fields' names; the recipes' own are checked with the recipe."""


def _check_numbers(options: object) -> None:
    """Refuse a number out of its range, as soon as it is typed."""
    for name, (low, high) in _RANGES.items():
        given = getattr(options, name, None)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie in [{low}, {high}], got {value}")


@dataclass(frozen=True)
class MachineOptions:
    """What the run uses of the machine."""

    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: Annotated[int | None, _INT] = None
    """CPU threads (default: one for each core)."""
    debug: bool = False
    """Show the whole traceback of an error."""


@dataclass(frozen=True)
class GpuOptions:
    """How a GPU is used; results don't depend on it."""

    memory_budget: Annotated[str | None, tyro.conf.arg(metavar="SIZE", help_behavior_hint="")] = None
    """Keep to so much GPU memory, for example 10GiB: the fastest way to run the models that fits is chosen."""
    compile: bool = True
    """Compile parts of the models before the first step, which takes a minute the first time and pays after a few."""


@dataclass(frozen=True)
class FolderOptions:
    """Where results go."""

    out: Annotated[str | None, _FOLDER] = None
    """Folder for the results; made if needed."""
    resume: Annotated[str | None, _FOLDER] = None
    """Go on with the unfinished run in this folder; its settings need not be given again."""
    overwrite: bool = False
    """Replace the results that --out already holds."""


@dataclass(frozen=True)
class PriorOptions:
    """Where the models come from. MODEL is a folder in diffusers' format, a checkpoint, or a hub id."""

    download: bool = False
    """Fetch a model that is named by a hub id (or an id that `dream4d priors` lists) and is not here yet."""
    tiny_vae: Annotated[str | None, _FOLDER] = None
    """AutoencoderTiny that takes the place of the models' own autoencoder: less memory, coarser images."""


@dataclass(frozen=True)
class LoraOptions:
    """What is added to the text-to-image model."""

    image_lora: Annotated[str | None, _FILE] = None
    """LoRA (DreamBooth's, say) for the text-to-image model; its subject is "sks" in the prompt. "toy" is the one in the
    package, of "a sks snowman", for --recipe toy-personalised."""
    image_lora_strength: float = 1.0
    """How much of it."""

    __post_init__ = _check_numbers


@dataclass(frozen=True)
class MapOptions:
    """What is known of the image beside its colours."""

    mask: Annotated[str | None, _FILE] = None
    """Image of the same size, black and white (default: the image's alpha)."""
    mask_shows: Annotated[Literal["automatic", "subject", "background"], tyro.conf.arg(metavar="PART")] = "automatic"
    """What is white in --mask: subject, background, or automatic, which tells it by what lies under the mask and where,
    and asks where that can't be told."""
    depth_map: Annotated[str | None, _FILE] = None
    """Grey image of the same size, bright where the object is near (--static.reference.depth-near); it needs
    --static.reference.depth or .relative-depth above 0."""
    normal_map: Annotated[str | None, _FILE] = None
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
    """Frames of each of the final video's 8 parts: still and orbiting camera in turns, the animation once in each."""
    fps: float = 24.0
    """Frames per second."""
    samples: Annotated[int | None, _INT] = None
    """Samples along a ray (default: the scene's own)."""

    __post_init__ = _check_numbers


@dataclass(frozen=True)
class TextTo3D:
    """Make a still object from a sentence."""

    prompt: Prompt = None
    """What to make, for example "a red cube"."""
    recipe: Annotated[str, tyro.conf.arg(metavar="NAME")] = "toy"
    """toy (small models that come with the package) or text-to-3d (the published settings); toy-personalised and
    personalised-3d for a subject of your own: its word "sks" is told to the image model alone."""
    seed: int = 0
    """Everything random follows from it."""
    steps: Annotated[int | None, _INT] = None
    """Training steps (default: the recipe's)."""
    sd_view: Annotated[float | None, _FLOAT] = None
    """Ask the image model only for views less than so many degrees from the front: 180 all, 145 spares the back and
    lessens two-faced results (default: the recipe's)."""
    multiview_prior: Annotated[str | None, _MODEL] = None
    """Multi-view model (default with the recipe toy: the one in the package)."""
    image_prior: Annotated[str | None, _MODEL] = None
    """Text-to-image model."""
    lora: Annotated[LoraOptions, Flat] = field(default_factory=LoraOptions)
    priors: Annotated[PriorOptions, Flat] = field(default_factory=PriorOptions)
    images: Annotated[ImageOptions, Flat] = field(default_factory=ImageOptions)
    folders: Annotated[FolderOptions, Flat] = field(default_factory=FolderOptions)
    gpu: Annotated[GpuOptions, Flat] = field(default_factory=GpuOptions)
    machine: Annotated[MachineOptions, Flat] = field(default_factory=MachineOptions)

    __post_init__ = _check_numbers


@dataclass(frozen=True)
class Animate:
    """Let the object of a scene file move as a sentence says."""

    scene: SceneFile = None
    """The scene file to animate."""
    prompt: Prompt = None
    """What it does, for example "a red cube is jumping"."""
    recipe: Annotated[str, tyro.conf.arg(metavar="NAME")] = "toy"
    """toy, or the published zeroscope-144x80, zeroscope-72x40, modelscope."""
    seed: int = 0
    """Everything random follows from it."""
    steps: Annotated[int | None, _INT] = None
    """Training steps (default: the recipe's)."""
    hifa_steps: Annotated[int | None, _INT] = None
    """Denoising steps of the targets: 4 move more steadily, at several times the cost (default: the recipe's)."""
    deformation_scale: Annotated[float | None, _FLOAT] = None
    """Zoom of the object into the frame (default: chosen from the object's size)."""
    video_prior: Annotated[str | None, _MODEL] = None
    """Text-to-video model (default with the recipe toy: the one in the package)."""
    priors: Annotated[PriorOptions, Flat] = field(default_factory=PriorOptions)
    images: Annotated[ImageOptions, Flat] = field(default_factory=ImageOptions)
    folders: Annotated[FolderOptions, Flat] = field(default_factory=FolderOptions)
    gpu: Annotated[GpuOptions, Flat] = field(default_factory=GpuOptions)
    machine: Annotated[MachineOptions, Flat] = field(default_factory=MachineOptions)

    __post_init__ = _check_numbers


@dataclass(frozen=True)
class TextTo4D:
    """Make a moving object from a sentence: first the object, then its motion."""

    prompt: Prompt = None
    """What to make and what it does, for example "a red cube is jumping"."""
    object_prompt: Annotated[str | None, _TEXT] = None
    """Another sentence for the first stage (default: the prompt)."""
    recipe: Annotated[str, tyro.conf.arg(metavar="NAME")] = "toy"
    """toy (small models that come with the package) or text-to-3d (the published settings); toy-personalised and
    personalised-3d for a subject of your own: its word "sks" is told to the image model alone."""
    motion_recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """toy, zeroscope-144x80, zeroscope-72x40 or modelscope (default: toy, or zeroscope-144x80 for text-to-3d)."""
    seed: int = 0
    """Everything random follows from it."""
    steps: Annotated[int | None, _INT] = None
    """Training steps of the first stage (default: the recipe's)."""
    motion_steps: Annotated[int | None, _INT] = None
    """Training steps of the second stage (default: the recipe's)."""
    sd_view: Annotated[float | None, _FLOAT] = None
    """Ask the image model only for views less than so many degrees from the front: 180 all, 145 spares the back and
    lessens two-faced results (default: the recipe's)."""
    hifa_steps: Annotated[int | None, _INT] = None
    """Denoising steps of the second stage's targets: 4 move more steadily, at several times the cost (default: the
    recipe's)."""
    deformation_scale: Annotated[float | None, _FLOAT] = None
    """Zoom of the object into the frame (default: chosen from the object's size)."""
    multiview_prior: Annotated[str | None, _MODEL] = None
    """Multi-view model (default with the recipe toy: the one in the package)."""
    image_prior: Annotated[str | None, _MODEL] = None
    """Text-to-image model."""
    video_prior: Annotated[str | None, _MODEL] = None
    """Text-to-video model (default with the recipe toy: the one in the package)."""
    lora: Annotated[LoraOptions, Flat] = field(default_factory=LoraOptions)
    priors: Annotated[PriorOptions, Flat] = field(default_factory=PriorOptions)
    images: Annotated[ImageOptions, Flat] = field(default_factory=ImageOptions)
    folders: Annotated[FolderOptions, Flat] = field(default_factory=FolderOptions)
    gpu: Annotated[GpuOptions, Flat] = field(default_factory=GpuOptions)
    machine: Annotated[MachineOptions, Flat] = field(default_factory=MachineOptions)

    __post_init__ = _check_numbers


@dataclass(frozen=True)
class ImageTo3D:
    """Make a still object from an image."""

    image: Image = None
    """An image of the object, cut out (with alpha); it is centred and brought to the size that the recipe wants."""
    prompt: Annotated[str | None, _TEXT] = None
    """What the image shows, for example "a red cube"; not needed with --static.guidance.1.weight 0."""
    maps: Annotated[MapOptions, Flat] = field(default_factory=MapOptions)
    recipe: Annotated[str, tyro.conf.arg(metavar="NAME")] = "toy-image"
    """toy-image (small models that come with the package) or image-to-3d (the published settings)."""
    seed: int = 0
    """Everything random follows from it."""
    steps: Annotated[int | None, _INT] = None
    """Training steps (default: the recipe's)."""
    novel_view_prior: Annotated[str | None, _MODEL] = None
    """Novel-view model (default with the recipe toy-image: the one in the package)."""
    pixel_prior: Annotated[str | None, _MODEL] = None
    """Text-to-pixels model (default with the recipe toy-image: the one in the package)."""
    priors: Annotated[PriorOptions, Flat] = field(default_factory=PriorOptions)
    images: Annotated[ImageOptions, Flat] = field(default_factory=ImageOptions)
    folders: Annotated[FolderOptions, Flat] = field(default_factory=FolderOptions)
    gpu: Annotated[GpuOptions, Flat] = field(default_factory=GpuOptions)
    machine: Annotated[MachineOptions, Flat] = field(default_factory=MachineOptions)

    __post_init__ = _check_numbers


@dataclass(frozen=True)
class ImageTo4D:
    """Make a moving object from an image: first the object, then its motion."""

    image: Image = None
    """An image of the object, cut out (with alpha); it is centred and brought to the size that the recipe wants."""
    prompt: Annotated[str | None, _TEXT] = None
    """What the image shows and what it does, for example "a red cube is jumping"."""
    maps: Annotated[MapOptions, Flat] = field(default_factory=MapOptions)
    recipe: Annotated[str, tyro.conf.arg(metavar="NAME")] = "toy-image"
    """toy-image (small models that come with the package) or image-to-3d (the published settings)."""
    object_prompt: Annotated[str | None, _TEXT] = None
    """Another sentence for the first stage (default: the prompt)."""
    motion_recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """toy, zeroscope-144x80, zeroscope-72x40 or modelscope (default: toy, or zeroscope-144x80 for image-to-3d)."""
    seed: int = 0
    """Everything random follows from it."""
    steps: Annotated[int | None, _INT] = None
    """Training steps of the first stage (default: the recipe's)."""
    motion_steps: Annotated[int | None, _INT] = None
    """Training steps of the second stage (default: the recipe's)."""
    hifa_steps: Annotated[int | None, _INT] = None
    """Denoising steps of the second stage's targets: 4 move more steadily, at several times the cost (default: the
    recipe's)."""
    deformation_scale: Annotated[float | None, _FLOAT] = None
    """Zoom of the object into the frame (default: chosen from the object's size)."""
    novel_view_prior: Annotated[str | None, _MODEL] = None
    """Novel-view model (default with the recipe toy-image: the one in the package)."""
    pixel_prior: Annotated[str | None, _MODEL] = None
    """Text-to-pixels model (default with the recipe toy-image: the one in the package)."""
    video_prior: Annotated[str | None, _MODEL] = None
    """Text-to-video model (default with the recipe toy: the one in the package)."""
    priors: Annotated[PriorOptions, Flat] = field(default_factory=PriorOptions)
    images: Annotated[ImageOptions, Flat] = field(default_factory=ImageOptions)
    folders: Annotated[FolderOptions, Flat] = field(default_factory=FolderOptions)
    gpu: Annotated[GpuOptions, Flat] = field(default_factory=GpuOptions)
    machine: Annotated[MachineOptions, Flat] = field(default_factory=MachineOptions)

    __post_init__ = _check_numbers


@dataclass(frozen=True)
class TextTo3DCall:
    """`text-to-3d` with every number of its recipe."""

    options: Annotated[TextTo3D, Flat]
    static: StaticRecipe


@dataclass(frozen=True)
class AnimateCall:
    """`animate` with every number of its recipe."""

    options: Annotated[Animate, Flat]
    motion: MotionRecipe


@dataclass(frozen=True)
class TextTo4DCall:
    """`text-to-4d` with every number of its recipes."""

    options: Annotated[TextTo4D, Flat]
    static: StaticRecipe
    motion: MotionRecipe


@dataclass(frozen=True)
class ImageTo3DCall:
    """`image-to-3d` with every number of its recipe."""

    options: Annotated[ImageTo3D, Flat]
    static: StaticRecipe


@dataclass(frozen=True)
class ImageTo4DCall:
    """`image-to-4d` with every number of its recipes."""

    options: Annotated[ImageTo4D, Flat]
    static: StaticRecipe
    motion: MotionRecipe


Pass = Literal["rgb", "depth", "normals", "opacity", "displacement"]


@dataclass(frozen=True)
class Render:
    """Make videos or images of a scene file."""

    scene: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SCENE")]
    """The scene file."""
    out: Annotated[Path | None, _FOLDER] = None
    """Folder for the results (default: "renders" beside the scene)."""
    path: Literal["orbit", "fixed", "final"] = "orbit"
    """orbit: once around; fixed: one camera films the animation; final: four times each, in turns."""
    passes: tuple[Pass, ...] = ("rgb",)
    """What to make images of: rgb, depth, normals, opacity, displacement."""
    size: tuple[int, int] = (256, 256)
    """Width and height, pixels."""
    frames: int = 48
    """Number of frames (final: of each of its 8 parts)."""
    fps: float = 24.0
    """Frames per second."""
    video: bool = True
    """Write an mp4 for each pass."""
    png: bool = False
    """Write every frame as a PNG file."""
    azimuth_deg: float = 0.0
    """Where the camera stands or starts: 0 is the front, 90 the object's left side."""
    elevation_deg: float = 15.0
    """Height of the camera above the horizon."""
    distance: float = 3.0
    """Distance of the camera from the object's middle."""
    fov_y_deg: float = 40.0
    """Vertical field of view."""
    time: float = 0.0
    """The moment, 0 to 1, that an orbit shows."""
    animate: bool = False
    """Let the animation run during the orbit."""
    samples: Annotated[int | None, _INT] = None
    """Samples along a ray (default: the scene's own)."""
    overwrite: bool = False
    """Replace files of the same names."""
    machine: Annotated[MachineOptions, Flat] = field(default_factory=MachineOptions)

    __post_init__ = _check_numbers


@dataclass(frozen=True)
class Import:
    """Turn a checkpoint of the original Dream-in-4D into a scene file."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """The checkpoint (a torch file)."""
    out: Annotated[Path, _FILE]
    """The scene file to write."""
    overwrite: bool = False
    """Replace the file if it is there."""
    machine: Annotated[MachineOptions, Flat] = field(default_factory=MachineOptions)


@dataclass(frozen=True)
class Info:
    """Say what a scene file, a checkpoint or a run's folder holds, or which kernels are in use."""

    file: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="FILE")] = None
    """The file."""
    kernels: bool = False
    """Which kernels run on this machine, and why others don't."""
    json: bool = False
    """As JSON, for programs."""
    machine: Annotated[MachineOptions, Flat] = field(default_factory=MachineOptions)


@dataclass(frozen=True)
class Bench:
    """Measure seconds a step and peak memory of recipes, in each of their phases."""

    recipes: tuple[str, ...] = ("static:toy", "motion:toy")
    """Recipes as STAGE:NAME, for example static:text-to-3d, image:image-to-3d or motion:zeroscope-144x80; or all."""
    models: Literal["toy", "full"] = "toy"
    """toy: the small models unless folders are given; full: the published models' architectures with random weights,
    built on the device."""
    variants: tuple[str, ...] = ("fast",)
    """fast; plain: PyTorch without our changes; tiny: fast with the tiny autoencoder. @10GiB behind one keeps to a
    memory budget."""
    steps: int = 20
    """Steps that are measured."""
    warmup: int = 3
    """Steps before them that are not."""
    profile: bool = False
    """Look into some more steps: which work takes longest, and how often the CPU waits for the GPU."""
    multiview_prior: Annotated[str | None, _MODEL] = None
    """Multi-view model."""
    image_prior: Annotated[str | None, _MODEL] = None
    """Text-to-image model."""
    novel_view_prior: Annotated[str | None, _MODEL] = None
    """Novel-view model."""
    pixel_prior: Annotated[str | None, _MODEL] = None
    """Text-to-pixels model."""
    video_prior: Annotated[str | None, _MODEL] = None
    """Text-to-video model."""
    out: Annotated[Path | None, _FILE] = None
    """Write the results as JSON into this file too."""
    priors: Annotated[PriorOptions, Flat] = field(default_factory=PriorOptions)
    machine: Annotated[MachineOptions, Flat] = field(default_factory=MachineOptions)

    __post_init__ = _check_numbers


@dataclass(frozen=True)
class Priors:
    """List the full-size models: where they are, their size, licence, gate and memory."""

    json: bool = False
    """As JSON, for programs."""
    folder: Annotated[str | None, _FOLDER] = None
    """List what can be used of the models below this folder instead (ComfyUI's "models", say)."""
    machine: Annotated[MachineOptions, Flat] = field(default_factory=MachineOptions)


@dataclass(frozen=True)
class Convert:
    """Turn a checkpoint of Stable Diffusion, MVDream or Zero123 into a folder in diffusers' format."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """The checkpoint (.safetensors, .ckpt, .pt)."""
    out: Annotated[Path, _FOLDER]
    """The folder to write."""
    kind: Annotated[
        Literal["image", "multiview", "novel_view"] | None, tyro.conf.arg(metavar="KIND", help_behavior_hint="")
    ] = None
    """What it must be: image, multiview or novel_view (default: what it is)."""
    config: Annotated[Path | None, _FILE] = None
    """The model's own configuration, .yaml or .json (default: the one of its name beside it, if any)."""
    half: bool = False
    """Write the weights in half precision."""
    overwrite: bool = False
    """Replace the folder if it is there."""
    machine: Annotated[MachineOptions, Flat] = field(default_factory=MachineOptions)
