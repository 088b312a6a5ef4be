"""Recipes: every number of a run, as frozen dataclasses.

The published settings (Dream-in-4D, arXiv 2311.16854, and the papers it builds on) and a `toy` size of each stage
for the small priors that ship with the package. A variant is a value made with `dataclasses.replace`. Positions in
time are shares of the run, so a recipe keeps its shape when only `steps` is changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

from ..cameras import CameraBatch, CameraRanges, Orbit, sample_orbits, sample_takes, sample_views
from ..fields.background import BackgroundConfig
from ..fields.deformation import DeformationConfig
from ..fields.encodings import HashGridConfig
from ..fields.radiance import RadianceConfig
from ..guidance.combine import published_scale
from ..guidance.distillation import DistillationConfig
from ..guidance.prompts import NEGATIVE_PROMPT
from ..guidance.windows import Windows
from ..priors.handle import PriorKind
from ..randomness import Source
from ..scene import SceneConfig
from ..schedules import Schedule, constant
from ..supervision import RandomBackground, RegularizerWeights, SightWeights


@dataclass(frozen=True)
class Phase:
    """Image size and number of camera groups from a share of the run on."""

    start: float  # share of the run
    n_groups: int  # groups of views or takes, B, in each process
    height: int  # pixels
    width: int
    displacement_tv: float | None = None  # weight of that term from here on, where it is another than the recipe's


@dataclass(frozen=True)
class GuidanceTerm:
    """One prior's part in the loss."""

    prior: PriorKind
    weight: float  # 0 leaves the prior out: its model is not needed then
    distillation: DistillationConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam or AdamW with a learning rate per kind of parameter."""

    name: Literal["adamw", "adam"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-15  # entries of a grid that are rarely met have gradients that small (2201.05989, section 4)
    weight_decay: float = 0.01  # of AdamW
    lr_grid: float = 0.01  # of the hash grid's entries
    lr_mlp: float = 0.001  # of the networks that read it
    lr_body: float = 0.0  # of the motion as a whole, where a deformation has one; 0: as of the grid
    lr_background: float = 0.001
    milestones: tuple[float, ...] = ()  # shares of the run at which all rates are multiplied
    factor: float = 0.5  # by which, at each milestone


@dataclass(frozen=True)
class LoopConfig:
    """What the training loop itself needs."""

    precision: Literal["half", "full"] = "half"  # half: fp16 autocast with loss scaling on CUDA, full elsewhere
    occupancy_every: int = 16  # steps between updates of where density may be
    checkpoint_steps: int = 500  # steps between checkpoints, or earlier after the seconds below
    checkpoint_seconds: float = 30.0  # seconds between checkpoints, or earlier after the steps above
    max_bad_steps: int = 20  # in a row without a finite gradient that a run bears


@dataclass(frozen=True)
class ReferencePhase:
    """Size of the reference image from a share of the run on."""

    start: float  # share of the run
    size: int  # height and width, pixels


@dataclass(frozen=True)
class ReferenceConfig:
    """The image that a scene is made from: the camera that saw it, and what its terms weigh.

    Every step compares the scene, seen by this camera, with the image (the "reference pass"). A weight of 0 leaves
    a term out; see supervision/losses.py.
    """

    azimuth_deg: float = 0.0  # 0: the image shows the front
    elevation_deg: float = 0.0
    distance: float = 3.8  # world units
    fov_y_deg: float = 20.0
    # Least and largest share of the frame that the subject's longer side may take. An image whose subject takes less
    # or more is cut or padded until it takes that share; it is centred in any case.
    fill: tuple[float, float] = (0.8, 0.8)
    phases: tuple[ReferencePhase, ...] = (ReferencePhase(0.0, 128),)
    ray_jitter: float = 2e-3  # deviation of a normal offset on the rays' directions
    rgb: float = 500.0  # weight of the colours' squared error, over the scene's background
    mask: float = 50.0  # weight of the opacity's squared error
    depth: float = 0.0  # weight of the depth map after the best scale and shift
    relative_depth: float = 0.0  # weight of the depth map by its correlation
    depth_near: Literal["bright", "dark"] = "bright"  # the depth map where the subject is near; estimators: bright
    normal: float = 0.0  # weight of the normal map
    entropy: float = 0.0  # weight of opacities between 0 and 1 in this pass


@dataclass(frozen=True)
class StaticRecipe:
    """Stage 1: a static scene from priors of images, and from an image where there is a `reference`."""

    name: str  # of the shipped recipe that these numbers began as
    steps: int  # of the whole run
    scene: SceneConfig
    cameras: CameraRanges  # that the priors' views are drawn from
    n_views: int  # of one moment, F
    phases: tuple[Phase, ...]
    guidance: tuple[GuidanceTerm, ...]
    regularizers: RegularizerWeights = field(default_factory=RegularizerWeights)
    background: RandomBackground = field(default_factory=RandomBackground)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    negative_prompt: str = NEGATIVE_PROMPT  # what priors are told not to make
    reference: ReferenceConfig | None = None
    orbit: Orbit | None = None  # a group's views go once around and end where the reference was seen from; None: spread

    stage: ClassVar[Literal["static"]] = "static"
    group_field: ClassVar[str] = "n_views"  # the field that holds F
    gradient_frames: ClassVar[None] = None  # every view carries gradient
    windows: ClassVar[None] = None  # its priors see all views at once

    def sample_cameras(self, phase: Phase, source: Source) -> CameraBatch:
        """Draw the cameras [n_groups, n_views] of a step."""
        if self.orbit is not None and self.reference is not None:
            end = (math.radians(self.reference.azimuth_deg), math.radians(self.reference.elevation_deg))
            size = (phase.height, phase.width)
            return sample_orbits(self.cameras, self.orbit, end, phase.n_groups, self.n_views, *size, source)
        return sample_views(self.cameras, phase.n_groups, self.n_views, phase.height, phase.width, source)

    @property
    def least_images(self) -> int:
        """How many images its priors see in a step, at the least."""
        return min(phase.n_groups for phase in self.phases) * self.n_views

    def trained(self, scene: SceneConfig) -> SceneConfig:
        """The configuration of what is trained on a scene."""
        return scene


@dataclass(frozen=True)
class MotionRecipe:
    """Stage 2: a deformation over time of a frozen static scene, from a prior of videos."""

    name: str  # of the shipped recipe that these numbers began as
    steps: int  # of the whole run
    deformation: DeformationConfig
    cameras: CameraRanges
    n_frames: int  # of one take, F
    phases: tuple[Phase, ...]
    guidance: tuple[GuidanceTerm, ...]
    # Frames of a take, at most, that carry gradient in a step; one part of the take after the other is as likely to be
    # drawn, and counts for the others. Fewer take less memory and make the gradient noisier. None: all.
    gradient_frames: int | None = None
    time_span: tuple[float, float] = (0.8, 1.0)  # shortest and longest share of the animation that a take films
    # of a loop: between which moments takes begin, which go on past 1; None: they end within, as without a loop
    loop_starts: tuple[float, float] | None = None
    target_extent: float = 0.65  # the object's radius (share of the box's) that the automatic deformation scale aims at
    min_scale: float = 1.2  # where the automatic scale would be less than this, it is 1
    max_scale: float = 2.0  # of the automatic scale
    motion_strength: float | None = None  # the scene moves so many times as far as the prior is shown; None: once
    densest: float | None = None  # density that the still is bent to stay below while its motion is trained
    softness: float | None = None  # standard deviation of the blur of that density, in shares of the box
    # of the object's size: a motion as a whole that goes less far, in the mean over points and moments, is left out
    least_motion: float = 0.0
    doubt: Schedule = constant(1.0)  # over the run, in shares of what fields/body.py has about a motion as a whole
    first_levels: int = 4  # grid levels that are trained from the beginning
    level_rate: float = 20.0  # grid levels set free over the whole run, after the first ones
    fresh_background: BackgroundConfig | None = None  # takes the place of the scene's background, trained too
    regularizers: RegularizerWeights = field(default_factory=RegularizerWeights)
    background: RandomBackground = field(default_factory=RandomBackground)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    negative_prompt: str = NEGATIVE_PROMPT  # what priors are told not to make
    windows: Windows | None = None  # how the prior sees takes that are longer than its own

    stage: ClassVar[Literal["motion"]] = "motion"
    group_field: ClassVar[str] = "n_frames"  # the field that holds F
    reference: ClassVar[None] = None
    orbit: ClassVar[None] = None

    def sample_cameras(self, phase: Phase, source: Source) -> CameraBatch:
        """Draw the cameras [n_groups, n_frames] of a step."""
        size = (phase.height, phase.width)
        spans = (self.time_span, self.loop_starts)
        return sample_takes(self.cameras, phase.n_groups, self.n_frames, *size, source, *spans)

    @property
    def least_images(self) -> int:
        """How many images its prior sees in a step, at the least."""
        return min(phase.n_groups for phase in self.phases) * self.n_frames

    def trained(self, scene: SceneConfig) -> SceneConfig:
        """The configuration of what is trained on a scene."""
        longer = None if self.windows is None else self.deformation.lasting(self.windows.length)
        return replace(scene, deformation=longer or self.deformation)


@dataclass(frozen=True)
class MeshRecipe:
    """A static scene from a mesh, told by rays that many cameras see it along, and by points around it."""

    name: str  # of the shipped recipe that these numbers began as
    steps: int  # of the whole run
    scene: SceneConfig
    n_views: int  # cameras all around
    view_size: int  # height and width of what each sees, pixels
    phases: tuple[SightWeights, ...]
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    stage: ClassVar[Literal["mesh"]] = "mesh"
    least_images: ClassVar[int] = 1  # its rays are those of no whole image


_Recipe = TypeVar("_Recipe", bound=StaticRecipe | MotionRecipe)


# --- Stage 1, as published -------------------------------------------------------------------------------------

# MVDream 2308.16512: from much noise to little over the first 80 % of the run
_MVDREAM = DistillationConfig(
    guidance_scale=50.0,
    min_noise=Schedule(0.98, 0.02, 0.0, 0.8),
    max_noise=Schedule(0.98, 0.50, 0.0, 0.8),
    loss="x0",
    rescale=0.5,
    shared_timestep=True,
)
_STABLE_DIFFUSION = DistillationConfig(
    guidance_scale=published_scale(100.0), min_noise=constant(0.2), max_noise=constant(0.6)
)

TEXT_TO_3D = StaticRecipe(
    name="text-to-3d",
    steps=10_000,
    scene=SceneConfig(),
    cameras=CameraRanges(),
    n_views=4,
    phases=(Phase(0.0, 2, 64, 64), Phase(0.5, 1, 256, 256)),
    guidance=(GuidanceTerm("multiview", 2.0, _MVDREAM), GuidanceTerm("image", 1.0, _STABLE_DIFFUSION)),
)

PERSONALISED_3D = replace(TEXT_TO_3D, name="personalised-3d")
"""The same numbers; the image prior has a subject's LoRA, and it alone is told the subject's word ("sks")."""

_ZERO123 = DistillationConfig(
    guidance_scale=3.0, min_noise=Schedule(0.4, 0.2, 0.0, 0.1), max_noise=Schedule(0.85, 0.5, 0.0, 0.1)
)
_DEEPFLOYD = DistillationConfig(guidance_scale=published_scale(20.0), min_noise=constant(0.02), max_noise=constant(0.5))
_WHITE = BackgroundConfig(color=(1.0, 1.0, 1.0))
_SCENE_BACKGROUND = RandomBackground(probability=0.0)

_SEEN = ReferenceConfig(
    phases=(ReferencePhase(0.0, 128), ReferencePhase(0.1, 256), ReferencePhase(0.15, 512)), entropy=0.1
)

IMAGE_TO_3D = StaticRecipe(
    name="image-to-3d",
    steps=2_000,
    scene=SceneConfig(background=_WHITE),
    cameras=CameraRanges(
        elevation_deg=(-10.0, 80.0), fov_y_deg=(20.0, 20.0), distance=(3.8, 3.8), relative_distance=False
    ),
    n_views=1,
    phases=(Phase(0.0, 12, 64, 64), Phase(0.1, 4, 128, 128), Phase(0.15, 2, 256, 256)),
    guidance=(GuidanceTerm("novel_view", 0.1, _ZERO123), GuidanceTerm("pixel", 0.1, _DEEPFLOYD)),
    regularizers=RegularizerWeights(opacity=0.1, entropy=0.1),
    background=_SCENE_BACKGROUND,
    optimizer=OptimizerConfig(name="adam", eps=1e-8, lr_mlp=0.01, lr_background=0.01),
    reference=_SEEN,
)

_SV3D = DistillationConfig(
    guidance_scale=2.5,  # for all views; 2403.12008 samples with 1 at the image up to 2.5 behind it
    # sigma 1.2 to 29 at first, 0.3 to 4 in the end: places of the logarithm between 0.002 and 700
    min_noise=Schedule(0.5, 0.4, 0.0, 0.5),
    max_noise=Schedule(0.75, 0.6, 0.0, 0.5),
)
IMAGE_TO_3D_ORBIT = replace(
    IMAGE_TO_3D,
    name="image-to-3d-orbit",
    # from view to view of a dynamic orbit the elevation changes by 18 degrees at most, as the azimuth by 17
    cameras=replace(IMAGE_TO_3D.cameras, elevation_deg=(-10.0, 60.0), fov_y_deg=(33.8, 33.8), distance=(2.2, 2.2)),
    n_views=21,
    phases=(Phase(0.0, 1, 64, 64), Phase(0.15, 1, 128, 128)),
    # a latent of 576x576 has five times the numbers of Zero123's, and a fifth of the weight
    guidance=(GuidanceTerm("novel_view", 0.02, _SV3D),),
    reference=replace(_SEEN, fov_y_deg=33.8, distance=2.2),  # the view of the model's training
    orbit="dynamic",
)
"""Stage 1 from an image by SV3D, which sees whole orbits; SV3D_u sees static ones."""

_ANY_IMAGE = DistillationConfig(
    guidance_scale=100.0,  # DreamFusion 2209.14988 section 3.1 for eps, RFDS 2406.03293 for flows: less is washed out
    min_noise=constant(0.02),
    # the shape comes at high noise, then the detail (HiFA 2305.18766, section 3.2)
    max_noise=Schedule(0.98, 0.5, 0.0, 0.8),
)
MODEL_IMAGE = replace(
    TEXT_TO_3D,
    name="model-image",
    # one group of four views around the object: all that an autoencoder of 512x512 can bear on a card of 12 GiB
    phases=(Phase(0.0, 1, 64, 64), Phase(0.2, 1, 128, 128), Phase(0.5, 1, 256, 256)),
    guidance=(GuidanceTerm("image", 1.0, _ANY_IMAGE),),
)
"""Stage 1 by any model of images; with no view of it that is told apart but by words, faces may come twice."""

# --- Stage 2, as published -------------------------------------------------------------------------------------

_VIDEO = DistillationConfig(
    guidance_scale=published_scale(100.0),
    min_noise=Schedule(0.99, 0.2, 0.0, 1.0),
    max_noise=Schedule(0.99, 0.5, 0.0, 1.0),
    loss="multistep",
    n_steps=1,
    color_weight=0.1,
)
# the 60 degrees behind the object are left out
_TAKES = CameraRanges(azimuth_deg=(-150.0, 150.0), elevation_deg=(0.0, 45.0))

ZEROSCOPE = MotionRecipe(
    name="zeroscope-144x80",
    steps=10_000,
    deformation=DeformationConfig(),
    cameras=_TAKES,
    n_frames=24,
    phases=(Phase(0.0, 1, 80, 144),),
    guidance=(GuidanceTerm("video", 1.0, _VIDEO),),
    fresh_background=BackgroundConfig(hidden_width=64, hidden_layers=3),
    regularizers=RegularizerWeights(displacement_tv=1000.0),
    optimizer=OptimizerConfig(lr_grid=0.001, milestones=(0.8, 0.9)),
)
ZEROSCOPE_72X40 = replace(ZEROSCOPE, name="zeroscope-72x40", phases=(Phase(0.0, 2, 40, 72),))
MODELSCOPE = replace(
    ZEROSCOPE,
    name="modelscope",
    n_frames=16,
    phases=(Phase(0.0, 1, 64, 64), Phase(0.7, 1, 256, 256, displacement_tv=10.0)),
)

_ANY_VIDEO = DistillationConfig(
    guidance_scale=25.0,  # where CHORD begins with Wan 2.2,
    last_guidance_scale=12.0,  # and where it ends
    # motion is decided at high noise, and lower noise prefers stillness: stay high for long, from much to less
    min_noise=Schedule(0.97, 0.3),
    max_noise=Schedule(0.98, 0.7),
)
MODEL_VIDEO = replace(
    ZEROSCOPE,
    name="model-video",
    n_frames=17,  # replaced by what the model wants
    guidance=(GuidanceTerm("video", 1.0, _ANY_VIDEO),),
)
"""Stage 2 by any model of videos."""

# --- The toy size ----------------------------------------------------------------------------------------------

TOY_FOV_DEG, TOY_DISTANCE, TOY_SIZE, TOY_FRAMES = 40.0, 3.0, 32, 8
TOY_CAMERAS = CameraRanges(
    elevation_deg=(0.0, 30.0),
    fov_y_deg=(TOY_FOV_DEG, TOY_FOV_DEG),
    distance=(TOY_DISTANCE, TOY_DISTANCE),
    relative_distance=False,
    elevation_law="uniform",
)
_TOY_GREY = RandomBackground(probability=1.0, low=0.15, high=1.0, grey=True)
_TOY_LOOP = LoopConfig(precision="full", occupancy_every=8, checkpoint_steps=50, checkpoint_seconds=20.0)
_TOY_BACKDROP = BackgroundConfig(color=(0.5, 0.5, 0.5))

TOY_STATIC = StaticRecipe(
    name="toy",
    steps=250,
    scene=SceneConfig(
        radiance=RadianceConfig(
            grid=HashGridConfig(n_levels=6, log2_entries=15, base_resolution=6, growth=1.45), hidden_width=32
        ),
        background=_TOY_BACKDROP,
        n_samples=64,
    ),
    cameras=TOY_CAMERAS,
    n_views=4,
    phases=(Phase(0.0, 1, TOY_SIZE, TOY_SIZE),),
    guidance=(
        GuidanceTerm(
            "multiview",
            1.0,
            DistillationConfig(
                guidance_scale=3.0,
                min_noise=Schedule(0.98, 0.05),
                max_noise=Schedule(0.98, 0.20),
                loss="x0",
                rescale=0.5,
                shared_timestep=True,
            ),
        ),
    ),
    regularizers=RegularizerWeights(opacity=80.0, entropy=300.0),
    background=_TOY_GREY,
    optimizer=OptimizerConfig(lr_mlp=0.01),
    loop=_TOY_LOOP,
    negative_prompt="",
)
TOY_MOTION = MotionRecipe(
    name="toy",
    steps=160,
    deformation=DeformationConfig(
        grid=HashGridConfig(n_levels=4, log2_entries=13, base_resolution=4, growth=1.447269237440378),
        hidden_layers=2,
        body_knots=11,  # what the little world's objects do is done by the whole of them
    ),
    # half of the takes from within 7 degrees of the front: the mark, which alone tells a spin, is seen there, and from
    # 25 on the small prior turns a cube whatever it is told
    cameras=replace(TOY_CAMERAS, azimuth_deg=(-110.0, 110.0), gather=3.0),
    n_frames=TOY_FRAMES,
    phases=(Phase(0.0, 1, TOY_SIZE, TOY_SIZE),),
    guidance=(
        GuidanceTerm(
            "video",
            1.0,
            DistillationConfig(
                guidance_scale=3.0,
                # motion is found out of much noise; what is no part of it comes to rest out of little
                min_noise=Schedule(0.98, 0.15, 0.2, 0.9),
                max_noise=Schedule(0.98, 0.55, 0.2, 0.9),
                loss="x0",
                rescale=1.0,  # more contrast than the object has would be met by making it larger
                shared_timestep=True,
            ),
        ),
    ),
    target_extent=0.55,
    # few pixels say whether an object turns or becomes thin, and it does not become thin without a reason
    regularizers=RegularizerWeights(rigidity=200.0),
    doubt=Schedule(0.0, 1.0, 0.35, 0.65),  # a spin must have come some way before the prior sees that it is one
    first_levels=0,  # the motion as a whole first,
    level_rate=2.0,  # then what is local, coarsely
    least_motion=0.033,  # of still things the small prior moves up to 0.026 by chance; what moves goes 0.05 and more
    min_scale=1.1,  # the small prior knows its objects at one size only, and makes smaller ones grow
    background=_TOY_GREY,
    optimizer=OptimizerConfig(lr_grid=0.003, lr_body=0.04, milestones=(0.3, 0.6, 0.75, 0.85, 0.93)),
    loop=_TOY_LOOP,
    negative_prompt="",
)

_TOY_IMAGE = DistillationConfig(
    guidance_scale=3.0, min_noise=Schedule(0.98, 0.05), max_noise=Schedule(0.98, 0.20), loss="x0", rescale=0.5
)
TOY_IMAGE = replace(
    TOY_STATIC,
    name="toy-image",
    scene=replace(TOY_STATIC.scene, background=_WHITE),
    cameras=replace(TOY_CAMERAS, elevation_deg=(-10.0, 60.0)),
    n_views=1,
    phases=(Phase(0.0, 4, TOY_SIZE, TOY_SIZE),),
    guidance=(
        GuidanceTerm("novel_view", 1.0, _TOY_IMAGE),
        GuidanceTerm("pixel", 0.2, _TOY_IMAGE),
    ),
    background=_SCENE_BACKGROUND,
    reference=ReferenceConfig(
        distance=TOY_DISTANCE,
        fov_y_deg=TOY_FOV_DEG,
        fill=(0.40, 0.60),
        phases=(ReferencePhase(0.0, TOY_SIZE), ReferencePhase(0.5, 2 * TOY_SIZE)),
        rgb=5000.0,
        mask=2000.0,
    ),
)
TOY_PERSONALISED = replace(
    TOY_STATIC,
    name="toy-personalised",
    guidance=(
        replace(TOY_STATIC.guidance[0], weight=0.3),
        GuidanceTerm("image", 2.0, replace(_TOY_IMAGE, guidance_scale=1.0)),
    ),
)
"""The multi-view prior, which isn't told the subject's word, leads the shape, the image prior the colours; more
guidance of the latter would overdraw what it learnt from four images."""

# --- From a mesh ------------------------------------------------------------------------------------------------

MESH = MeshRecipe(
    name="mesh",
    steps=1400,
    scene=SceneConfig(
        radiance=RadianceConfig(
            grid=HashGridConfig(n_levels=10, log2_entries=18, base_resolution=8, growth=1.5), hidden_width=64
        ),
        background=_TOY_BACKDROP,
        occupancy_resolution=64,
        n_samples=256,
    ),
    n_views=64,
    view_size=512,
    phases=(
        SightWeights(0.0, n_rays=256, n_points=2**16),
        SightWeights(0.2, n_rays=2**14, n_points=2**15, rgb=50.0, mask=50.0, solid=0.3),
    ),
    optimizer=OptimizerConfig(lr_mlp=0.005, milestones=(0.6, 0.8, 0.9)),
    loop=replace(_TOY_LOOP, occupancy_every=32),
)
"""For a GPU."""
MESH_QUICK = replace(
    MESH,
    name="mesh-quick",
    steps=600,
    scene=replace(
        MESH.scene,
        radiance=RadianceConfig(
            grid=HashGridConfig(n_levels=8, log2_entries=17, base_resolution=8, growth=1.6), hidden_width=32
        ),
        occupancy_resolution=48,
        n_samples=192,
    ),
    view_size=384,
    phases=(
        SightWeights(0.0, n_rays=256, n_points=2**12),
        SightWeights(0.4, n_rays=2**11, n_points=2**12, rgb=50.0, mask=50.0, solid=0.3),
    ),
    optimizer=replace(MESH.optimizer, lr_grid=0.02, lr_mlp=0.01),
)
"""For a CPU: coarser, in minutes on two cores."""

STATIC_RECIPES = {
    recipe.name: recipe for recipe in (TOY_STATIC, TEXT_TO_3D, PERSONALISED_3D, MODEL_IMAGE, TOY_PERSONALISED)
}
"""Stage 1 from a sentence."""
IMAGE_RECIPES = {recipe.name: recipe for recipe in (TOY_IMAGE, IMAGE_TO_3D)}
"""Stage 1 from an image."""
ORBIT_RECIPES = {IMAGE_TO_3D_ORBIT.name: IMAGE_TO_3D_ORBIT}
"""Stage 1 from an image, by models of whole orbits: those stand in ComfyUI's graph alone."""
MESH_RECIPES = {recipe.name: recipe for recipe in (MESH, MESH_QUICK)}
"""A still scene from a mesh."""
MOTION_RECIPES = {recipe.name: recipe for recipe in (TOY_MOTION, ZEROSCOPE, ZEROSCOPE_72X40, MODELSCOPE, MODEL_VIDEO)}


_SHIPPED: dict[str, dict[str, Any]] = {
    "static": STATIC_RECIPES | IMAGE_RECIPES | ORBIT_RECIPES,
    "motion": MOTION_RECIPES,
}


def shipped_recipe(recipe: _Recipe) -> _Recipe | None:
    """The recipe of this stage and name as it is shipped, or None."""
    return _SHIPPED[recipe.stage].get(recipe.name)


def find_recipe(name: str, recipes: dict):
    """Return the recipe of this name, or raise a ValueError that lists the known ones."""
    if name not in recipes:
        raise ValueError(f"unknown recipe {name!r}: choose one of {', '.join(recipes)}")
    return recipes[name]


def is_toy(recipe: StaticRecipe | MotionRecipe) -> bool:
    """Whether the models that come with the package are what the recipe was made for."""
    return recipe.name == "toy" or recipe.name.startswith("toy-")


TRAINED_STRENGTHS = (0.25, 2.0)
"""Least and largest `motion_strength`."""
MESH_RIGIDITY = 1000.0
"""Weight of that term in the motion of scenes that were made from meshes."""
MESH_DENSEST = 30.0
"""Density that these are kept below meanwhile, about that of scenes from priors: a harder one hardly begins to move."""
MESH_SOFTNESS = 0.008
"""Blur of these densities, in shares of the box, which makes their skin about as thick as in scenes from priors.

What a step says of the way to go is then less a matter of chance: of a cone that is to slide, the mean of the gradient
along the slide is 2.7 times its standard deviation over cameras, and 1.2 times without.
"""


def with_rigidity(recipe: MotionRecipe, weight: float) -> MotionRecipe:
    """Return the recipe with motion that keeps the distances between near points of the object, at this weight."""
    return replace(recipe, regularizers=replace(recipe.regularizers, rigidity=weight))


def for_mesh_scene(recipe: MotionRecipe) -> MotionRecipe:
    """Return the recipe as it suits a scene that was made from a mesh: rigid, and softer than it is meanwhile.

    Where the recipe itself says a weight of rigidity, or a density, that is kept.
    """
    if recipe.densest is None:
        recipe = replace(recipe, densest=MESH_DENSEST, softness=MESH_SOFTNESS)
    return with_rigidity(recipe, recipe.regularizers.rigidity or MESH_RIGIDITY)


def with_view_limit(recipe: StaticRecipe, max_azimuth_deg: float) -> StaticRecipe:
    """Return the recipe with an image prior that is asked only for views less than this far from the front.

    The published `SD_view`: 180 asks it for all, 145 spares the back and so lessens two-faced results.
    """
    if not any(term.prior == "image" for term in recipe.guidance):
        raise ValueError(f"the recipe {recipe.name!r} has no image prior whose views could be limited")
    terms = (
        replace(term, distillation=replace(term.distillation, max_azimuth_deg=max_azimuth_deg))
        if term.prior == "image"
        else term
        for term in recipe.guidance
    )
    return replace(recipe, guidance=tuple(terms))


def with_loop(recipe: MotionRecipe) -> MotionRecipe:
    """Return the recipe with a motion whose last moment is its first one, filmed from any moment on.

    But for the toy prior, which is told its frames' times: all films that it knows begin in the first fifth of them.
    """
    starts = recipe.loop_starts or (None if is_toy(recipe) else (0.0, 1.0))
    return replace(recipe, deformation=replace(recipe.deformation, loop=True), loop_starts=starts)


def with_motion_strength(recipe: MotionRecipe, strength: float) -> MotionRecipe:
    """Return the recipe with motion that goes so many times as far as what its prior is shown, and judges."""
    return replace(recipe, motion_strength=None if strength == 1 else strength)


def with_hifa_steps(recipe: MotionRecipe, n_steps: int) -> MotionRecipe:
    """Return the recipe with multi-step targets of so many denoising steps (HiFA 2305.18766)."""
    terms = (
        replace(t, distillation=replace(t.distillation, loss="multistep", n_steps=n_steps)) for t in recipe.guidance
    )
    return replace(recipe, guidance=tuple(terms))
