"""Nodes that make and animate scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from comfy_api.latest import io

from ..dream4d_engine.priors.handle import PriorHandle, PriorKind
from ..dream4d_engine.training.config import (
    IMAGE_RECIPES,
    MOTION_RECIPES,
    ORBIT_RECIPES,
    STATIC_RECIPES,
    TRAINED_STRENGTHS,
    MotionRecipe,
    StaticRecipe,
    find_recipe,
    for_mesh_scene,
    with_hifa_steps,
    with_loop,
    with_motion_strength,
)
from ..dream4d_engine.training.guidance import prompt_readers, with_frames_of, with_longer_takes, with_views_of
from ..dream4d_engine.training.motion import train_motion
from ..dream4d_engine.training.reference import AUTOMATIC as AUTOMATIC_MASK
from ..dream4d_engine.training.reference import MASK_SHOWS, Reference, UnclearMask, check_reference
from ..dream4d_engine.training.reference.masks import MaskShows
from ..dream4d_engine.training.static import train_static
from .checks import (
    check_budget,
    check_image,
    check_priors,
    check_prompt,
    check_ranges,
    check_recipe,
    check_types,
    first_complaint,
    recipe_name,
    require,
)
from .images import reference_of
from .readout import with_motion
from .session import AUTOMATIC, START_OVER, Run, RunError, carry_out, gradients, pick_priors, say_on_node, show_taken
from .sockets import CATEGORY, PriorPort, ScenePort, SceneValue

FROM_IMAGES = IMAGE_RECIPES | ORBIT_RECIPES
STILL_RECIPES = STATIC_RECIPES | FROM_IMAGES
_MOST_STEPS, _MOST_SEED, _MOST_FRAMES = 1_000_000, 2**63 - 1, 10_000
_GOES_ON = "Cancel keeps what is done: queue again to go on."
_REPLACED = "the scene moved before: that motion was replaced, not added to"
_ALIASES = ("dream4d", "score distillation", "sds")


def _prompt(tooltip: str) -> io.Input:
    return io.String.Input("prompt", multiline=True, default="a red cube is jumping", tooltip=tooltip)


def how_it_runs(after_seed: Sequence[io.Input] = (), last: Sequence[io.Input] = ()) -> list[io.Input]:
    """The inputs of all that is trained which come after the recipe's, with a stage's own among them."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=_MOST_SEED,
            control_after_generate=False,
            tooltip="Everything random follows from it.",
        ),
        *after_seed,
        io.Combo.Input(
            "resume",
            options=[AUTOMATIC, START_OVER],
            default=AUTOMATIC,
            advanced=True,
            tooltip="A run that was cancelled goes on when it is queued again with the same settings and inputs; "
            "'start over' throws away what was done.",
        ),
        io.Float.Input(
            "preview_seconds",
            default=4.0,
            min=0.0,
            max=600.0,
            step=0.5,
            advanced=True,
            tooltip="Time between two live previews on the node; 0 shows none. They take at most a twentieth of "
            "the run's time.",
        ),
        *last,
        io.Float.Input(
            "memory_budget",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=0.5,
            optional=True,
            advanced=True,
            tooltip="GiB of GPU memory that ComfyUI may take in this run: the fastest way that fits is found by "
            "trying, and shown on the node. 0: no limit. For GPUs only.",
        ),
    ]


def _negative() -> io.Input:
    return io.String.Input(
        "negative",
        default="",
        multiline=True,
        advanced=True,
        tooltip="What the result should not look like. Empty: the model's or the recipe's own words.",
    )


def steps_input(default: int) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=1, max=_MOST_STEPS, tooltip="Training steps.")


def _prior(kind: str, use: str, optional: bool = True) -> io.Input:
    return PriorPort.Input(f"{kind}_prior", optional=optional, tooltip=f"A prior of the kind {kind}{use}")


class OptimizeStaticScene(io.ComfyNode):
    """Stage 1."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        from_images = ", ".join(FROM_IMAGES)
        mask_shows = io.Combo.Input(
            "mask_shows",
            options=list(MASK_SHOWS),
            default=AUTOMATIC_MASK,
            advanced=True,
            tooltip="What is white in reference_mask. automatic tells it by what lies under the mask and where, and "
            "asks where that can't be told.",
        )
        return io.Schema(
            node_id="Dream4DOptimizeStaticScene",
            display_name="Optimize Static Scene",
            category=CATEGORY,
            description="Makes a still 3D object from a sentence, or from an image and a sentence, by score "
            f"distillation. {_GOES_ON}",
            search_aliases=["text to 3d", "image to 3d", "dreamfusion", "nerf", *_ALIASES],
            inputs=[
                _prior("multiview", "; the recipes that start from a sentence need it."),
                _prior("image", "; text-to-3d and the personalised recipes need it."),
                _prior("novel_view", "; the recipes that start from an image need it."),
                _prior("pixel", "; toy-image and image-to-3d need it."),
                io.Image.Input(
                    "reference_image",
                    optional=True,
                    tooltip=f"One image of the object, for the recipes {from_images}: cut out (with alpha), or "
                    "with reference_mask. What is taken as the object is shown on the node before training begins.",
                ),
                io.Mask.Input(
                    "reference_mask",
                    optional=True,
                    tooltip="Where the object is in reference_image. Load Image's mask and those of nodes that remove "
                    "a background are both understood.",
                ),
                ScenePort.Input(
                    "scene", optional=True, tooltip="A still scene to start from (a copy is trained); else a new one."
                ),
                _prompt(
                    "What to make, for example: a red cube. With the toy priors only their own words. "
                    f"{', '.join(ORBIT_RECIPES)} reads none: it may be empty."
                ),
                io.DynamicCombo.Input(
                    "recipe",
                    options=[io.DynamicCombo.Option(r.name, [steps_input(r.steps)]) for r in STILL_RECIPES.values()],
                    tooltip="All numbers of the run. The toy ones: for the toy priors, some minutes on a CPU. The "
                    "others: the published settings, for full-size models and a GPU. "
                    f"{from_images} start from an image.",
                ),
                *how_it_runs([_negative()], [mask_shows]),
            ],
            outputs=[ScenePort.Output("static_scene", display_name="scene", tooltip="The still scene.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        input_types: Mapping[str, str],
        prompt: str | None = None,
        recipe: Mapping | str | None = None,
        preview_seconds: float | None = None,
        memory_budget: float | None = None,
    ) -> bool | str:
        """Refuse empty prompts where one is read, unknown recipes, and sockets that don't fit the recipe."""
        name = recipe_name(recipe) or ""
        complaint = first_complaint(check_types(cls, input_types), check_recipe(name, STILL_RECIPES))
        if complaint is not True:
            return complaint
        image, mask = (socket in input_types for socket in ("reference_image", "reference_mask"))
        return first_complaint(
            check_prompt(prompt, read=bool(prompt_readers(STILL_RECIPES[name]))),
            check_budget(cls, memory_budget),
            check_ranges(cls, preview_seconds=preview_seconds),
            check_image(STILL_RECIPES[name], image, mask, FROM_IMAGES),
            check_priors(STILL_RECIPES[name], input_types),
        )

    @classmethod
    def execute(
        cls,
        prompt: str,
        recipe: Mapping,
        mask_shows: MaskShows,
        seed: int,
        negative: str,
        resume: str,
        preview_seconds: float,
        multiview_prior: PriorHandle | None = None,
        image_prior: PriorHandle | None = None,
        novel_view_prior: PriorHandle | None = None,
        pixel_prior: PriorHandle | None = None,
        reference_image: torch.Tensor | None = None,
        reference_mask: torch.Tensor | None = None,
        scene: SceneValue | None = None,
        memory_budget: float = 0.0,
    ) -> io.NodeOutput:
        """Train, on a copy of `scene` if there is one."""
        settings: StaticRecipe = replace(find_recipe(recipe["recipe"], STILL_RECIPES), steps=recipe["steps"])
        require(check_prompt(prompt, read=bool(prompt_readers(settings))), check_budget(cls, memory_budget))
        prompt = prompt.strip()
        given: dict[PriorKind, PriorHandle | None] = {"multiview": multiview_prior, "image": image_prior}
        given |= {"novel_view": novel_view_prior, "pixel": pixel_prior}
        priors = pick_priors(settings, given)
        settings = with_views_of(settings, priors)
        if scene is not None and scene.scene.deformation is not None:
            raise RunError("the scene to start from moves: connect a still one (Animate Scene takes those too)")
        start = None if scene is None else scene.scene
        reference = _reference(settings, reference_image, reference_mask, mask_shows, cls.hidden.unique_id)
        run = Run(
            "static",
            settings,
            priors,
            prompt,
            negative.strip(),
            seed,
            {"scene": None if scene is None else scene.fingerprint()},
            settings.scene if start is None else start.config,
            parent=None if scene is None else scene.provenance,
            reference=reference,
            memory_budget=budget_bytes(memory_budget),
        )

        def train(guidance, **given):
            return train_static(settings, guidance, seed=seed, scene=start, reference=reference, **given)

        node_id = cls.hidden.unique_id
        return io.NodeOutput(carry_out(run, train, node_id=node_id, resume=resume, preview_seconds=preview_seconds))


class AnimateScene(io.ComfyNode):
    """Stage 2."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DAnimateScene",
            display_name="Animate Scene",
            category=CATEGORY,
            description="Lets the object of a still scene move as a sentence says, by distilling a video model into a "
            f"deformation over time. {_GOES_ON}",
            search_aliases=["text to 4d", "animate 3d", "motion", *_ALIASES],
            inputs=[
                ScenePort.Input(
                    "scene", tooltip="The still scene (a copy is animated). Of one that moves, the motion is replaced."
                ),
                _prior("video", ".", optional=False),
                _prompt("What it does, for example: a red cube is jumping. With the toy prior only its words."),
                io.DynamicCombo.Input(
                    "recipe",
                    options=[
                        io.DynamicCombo.Option(r.name, [steps_input(r.steps), _hifa_steps(r)])
                        for r in MOTION_RECIPES.values()
                    ],
                    tooltip="All numbers of the run. toy: for the toy prior, some minutes on a CPU. The others: the "
                    "published settings, for full-size models and a GPU.",
                ),
                io.Float.Input(
                    "deformation_scale",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Zoom of the object into the frame; 0 chooses it from the object's size, 1 leaves it.",
                ),
                *how_it_runs([_negative()]),
                io.Boolean.Input(
                    "loop",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Let the motion end where it begins, so that it can be played again and again.",
                ),
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=_MOST_FRAMES,
                    optional=True,
                    advanced=True,
                    tooltip="Frames of the animation that is trained; 0: as many as the video model makes. More (3 "
                    "times as many, say) are seen through windows of time that overlap, and take as many times the "
                    "work and more.",
                ),
                io.Float.Input(
                    "motion_strength",
                    default=1.0,
                    min=TRAINED_STRENGTHS[0],
                    max=TRAINED_STRENGTHS[1],
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="How many times as far things go as the video model is shown: above 1 more than it asks "
                    "for, below 1 less. The preview shows what the model is shown.",
                ),
            ],
            outputs=[ScenePort.Output("moving_scene", display_name="scene", tooltip="The moving scene.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        input_types: Mapping[str, str],
        prompt: str | None = None,
        recipe: Mapping | str | None = None,
        deformation_scale: float | None = None,
        preview_seconds: float | None = None,
        memory_budget: float | None = None,
        frames: int | None = None,
        motion_strength: float | None = None,
    ) -> bool | str:
        """Refuse empty prompts, unknown recipes, sockets of another kind and zooms that no field has."""
        return first_complaint(
            check_types(cls, input_types),
            check_recipe(recipe_name(recipe), MOTION_RECIPES),
            check_prompt(prompt),
            check_budget(cls, memory_budget),
            check_ranges(
                cls,
                deformation_scale=deformation_scale,
                preview_seconds=preview_seconds,
                frames=frames,
                motion_strength=motion_strength,
            ),
            check_zoom(deformation_scale),
        )

    @classmethod
    def execute(
        cls,
        scene: SceneValue,
        video_prior: PriorHandle,
        prompt: str,
        recipe: Mapping,
        deformation_scale: float,
        seed: int,
        negative: str,
        resume: str,
        preview_seconds: float,
        memory_budget: float = 0.0,
        loop: bool = False,
        frames: int = 0,
        motion_strength: float = 1.0,
    ) -> io.NodeOutput:
        """Train a deformation on a copy of the scene."""
        require(
            check_prompt(prompt),
            check_zoom(deformation_scale),
            check_budget(cls, memory_budget),
            check_ranges(cls, frames=frames),
        )
        prompt = prompt.strip()
        settings = motion_recipe(recipe["recipe"], recipe["steps"], recipe["hifa_steps"])
        settings = with_loop(settings) if loop else settings
        settings = with_motion_strength(settings, motion_strength)
        priors = pick_priors(settings, {"video": video_prior})
        settings = with_longer_takes(with_frames_of(settings, priors), priors, frames or None)
        settings = settings if scene.provenance.first_mesh is None else for_mesh_scene(settings)
        scale = deformation_scale or None
        run = Run(
            "motion",
            settings,
            priors,
            prompt,
            negative.strip(),
            seed,
            {"scene": scene.fingerprint(), "deformation_scale": scale},
            scene.scene.config,
            parent=scene.provenance,
            memory_budget=budget_bytes(memory_budget),
        )

        def train(guidance, **given):
            return train_motion(scene.scene, settings, guidance, seed=seed, deformation_scale=scale, **given)

        node_id = cls.hidden.unique_id
        moving = carry_out(run, train, node_id=node_id, resume=resume, preview_seconds=preview_seconds)
        moving, line = with_motion(moving, node_id)
        replaced = "" if scene.scene.deformation is None else _REPLACED
        say_on_node("\n".join(filter(None, (line, replaced))), node_id)
        return io.NodeOutput(moving)


def check_zoom(scale: float | None) -> bool | str:
    """Refuse zooms that no field has; None isn't known yet."""
    too_small = scale is not None and 0 < scale < 0.05
    return "deformation_scale must be 0 (automatic) or at least 0.05" if too_small else True


def budget_bytes(gibibytes: float) -> int | None:
    """What the widget memory_budget means."""
    return round(gibibytes * 2**30) or None


def _hifa_steps(recipe: MotionRecipe) -> io.Int.Input:
    return io.Int.Input(
        "hifa_steps",
        default=recipe.guidance[0].distillation.n_steps,
        min=1,
        max=100,
        advanced=True,
        tooltip="Denoising steps for one step of training. More than 1 walk through the whole schedule (HiFA): cleaner "
        "targets, as many times the work.",
    )


def motion_recipe(name: str, steps: int, hifa_steps: int) -> MotionRecipe:
    """Return a recipe with another number of steps and, where it is changed, of denoising steps."""
    recipe: MotionRecipe = find_recipe(name, MOTION_RECIPES)
    if hifa_steps != recipe.guidance[0].distillation.n_steps:
        recipe = with_hifa_steps(recipe, hifa_steps)
    return replace(recipe, steps=steps)


def _reference(
    recipe: StaticRecipe, image: torch.Tensor | None, mask: torch.Tensor | None, shows: MaskShows, node_id: str | None
) -> Reference | None:
    """The prepared image that the recipe needs, shown on the node, or None where it needs none.

    Raises RunError or ImageError for what doesn't fit it.
    """
    require(check_image(recipe, image is not None, mask is not None, FROM_IMAGES))
    if image is None or recipe.reference is None:  # both, as none was refused
        return None
    with gradients():
        try:
            reference = reference_of(image, mask, shows, recipe.reference)
        except UnclearMask as question:
            show_taken(str(question), question.readings, node_id)
            raise
        check_reference(recipe, reference)
        show_taken(reference.statement, reference.over(), node_id)
    return reference
