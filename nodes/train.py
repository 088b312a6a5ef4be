"""Nodes that make and animate scenes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from comfy_api.latest import io

from ..dream4d_engine.training.config import MOTION_RECIPES, STATIC_RECIPES, MotionRecipe, StaticRecipe, find_recipe
from ..dream4d_engine.training.motion import train_motion
from ..dream4d_engine.training.needs import memory_bytes
from ..dream4d_engine.training.static import train_static
from .session import AUTOMATIC, START_OVER, Run, RunError, carry_out, pick_sources
from .sockets import CATEGORY, PriorPort, PriorSource, ScenePort, SceneValue

_MOST_STEPS, _MOST_SEED = 1_000_000, 2**63 - 1


def _prompt_input(tooltip: str) -> io.String.Input:
    return io.String.Input("prompt", multiline=True, default="a red cube is jumping", tooltip=tooltip)


def _common_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=_MOST_SEED,
            control_after_generate=False,
            tooltip="Everything random follows from it.",
        ),
        io.String.Input(
            "negative",
            default="",
            multiline=True,
            advanced=True,
            tooltip="What the result should not look like. Empty: the model's or the recipe's own words.",
        ),
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
            tooltip="Time between two live previews on the node; 0 shows none. They take at most a twentieth of the "
            "run's time.",
        ),
    ]


def _steps(default: int) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=1, max=_MOST_STEPS, tooltip="Training steps.")


class OptimizeStaticScene(io.ComfyNode):
    """Stage 1."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DOptimizeStaticScene",
            display_name="Optimize Static Scene",
            category=CATEGORY,
            description="Makes a still 3D object from a sentence by score distillation. Cancel keeps what is done: "
            "queue again to go on.",
            search_aliases=["text to 3d", "dream4d", "dreamfusion", "score distillation", "sds", "nerf"],
            inputs=[
                PriorPort.Input(
                    "multiview_prior", optional=True, tooltip="A prior of the kind multiview; every recipe needs it."
                ),
                PriorPort.Input(
                    "image_prior", optional=True, tooltip="A prior of the kind image; the recipe text-to-3d needs it."
                ),
                ScenePort.Input(
                    "scene", optional=True, tooltip="A still scene to start from (a copy is trained); else a new one."
                ),
                _prompt_input("What to make, for example: a red cube. With the toy priors only their own words."),
                io.DynamicCombo.Input(
                    "recipe",
                    options=[io.DynamicCombo.Option(r.name, [_steps(r.steps)]) for r in STATIC_RECIPES.values()],
                    tooltip="All numbers of the run. toy: for the toy priors, some minutes on a CPU. text-to-3d: the "
                    "published settings, for full-size models and a GPU.",
                ),
                *_common_inputs(),
            ],
            outputs=[ScenePort.Output("static_scene", display_name="scene", tooltip="The still scene.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, prompt: str | None = None, recipe: Mapping | None = None) -> bool | str:
        """Refuse an empty prompt and an unknown recipe."""
        return _first_complaint(_check_recipe(recipe, STATIC_RECIPES), _check_prompt(prompt))

    @classmethod
    def execute(
        cls,
        prompt: str,
        recipe: Mapping,
        seed: int,
        negative: str,
        resume: str,
        preview_seconds: float,
        multiview_prior: PriorSource | None = None,
        image_prior: PriorSource | None = None,
        scene: SceneValue | None = None,
    ) -> io.NodeOutput:
        """Train, on a copy of `scene` if there is one."""
        prompt = _said(prompt)
        settings: StaticRecipe = find_recipe(recipe["recipe"], STATIC_RECIPES)
        settings = replace(settings, steps=recipe["steps"])
        sources = pick_sources(settings, {"multiview": multiview_prior, "image": image_prior})
        if scene is not None and scene.scene.deformation is not None:
            raise RunError("the scene to start from moves: connect a still one (Animate Scene takes those too)")
        start = None if scene is None else scene.scene
        run = Run(
            "static",
            settings,
            sources,
            prompt,
            negative.strip(),
            seed,
            {"scene": None if scene is None else scene.fingerprint()},
            None if scene is None else scene.provenance,
            memory_bytes(settings, settings.scene if start is None else start.config),
        )

        def train(guidance, device, control):
            return train_static(settings, guidance, seed=seed, device=device, control=control, scene=start)

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
            description="Lets the object of a still scene move as a sentence says, by distilling a video model into "
            "a deformation over time. Cancel keeps what is done: queue again to go on.",
            search_aliases=["text to 4d", "dream4d", "animate 3d", "motion", "score distillation", "sds"],
            inputs=[
                ScenePort.Input("scene", tooltip="The still scene (a copy is animated)."),
                PriorPort.Input("video_prior", tooltip="A prior of the kind video."),
                _prompt_input("What it does, for example: a red cube is jumping. With the toy prior only its words."),
                io.DynamicCombo.Input(
                    "recipe",
                    options=[
                        io.DynamicCombo.Option(
                            r.name,
                            [
                                _steps(r.steps),
                                io.Int.Input(
                                    "hifa_steps",
                                    default=r.guidance[0].distillation.n_steps,
                                    min=1,
                                    max=100,
                                    advanced=True,
                                    tooltip="Denoising steps for one step of training. More than 1 walk through the "
                                    "whole schedule (HiFA): cleaner targets, as many times the work.",
                                ),
                            ],
                        )
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
                *_common_inputs(),
            ],
            outputs=[ScenePort.Output("moving_scene", display_name="scene", tooltip="The moving scene.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, prompt: str | None = None, recipe: Mapping | None = None) -> bool | str:
        """Refuse an empty prompt and an unknown recipe."""
        return _first_complaint(_check_recipe(recipe, MOTION_RECIPES), _check_prompt(prompt))

    @classmethod
    def execute(
        cls,
        scene: SceneValue,
        video_prior: PriorSource,
        prompt: str,
        recipe: Mapping,
        deformation_scale: float,
        seed: int,
        negative: str,
        resume: str,
        preview_seconds: float,
    ) -> io.NodeOutput:
        """Train a deformation on a copy of the scene."""
        prompt = _said(prompt)
        settings = motion_recipe(recipe["recipe"], recipe["steps"], recipe["hifa_steps"])
        sources = pick_sources(settings, {"video": video_prior})
        scale = deformation_scale or None
        run = Run(
            "motion",
            settings,
            sources,
            prompt,
            negative.strip(),
            seed,
            {"scene": scene.fingerprint(), "deformation_scale": scale},
            scene.provenance,
            memory_bytes(settings, scene.scene.config),
        )

        def train(guidance, device, control):
            return train_motion(
                scene.scene,
                settings,
                guidance,
                seed=seed,
                device=device,
                control=control,
                deformation_scale=scale,
            )

        node_id = cls.hidden.unique_id
        return io.NodeOutput(carry_out(run, train, node_id=node_id, resume=resume, preview_seconds=preview_seconds))


def motion_recipe(name: str, steps: int, hifa_steps: int) -> MotionRecipe:
    """Return a recipe with another number of steps and, where it is changed, of denoising steps."""
    recipe: MotionRecipe = find_recipe(name, MOTION_RECIPES)
    first = recipe.guidance[0]
    if hifa_steps != first.distillation.n_steps:
        changed = replace(first.distillation, loss="multistep", n_steps=hifa_steps)
        recipe = replace(recipe, guidance=(replace(first, distillation=changed), *recipe.guidance[1:]))
    return replace(recipe, steps=steps)


def _first_complaint(*checks: bool | str) -> bool | str:
    return next((check for check in checks if check is not True), True)


def _check_recipe(recipe: object, known: Mapping) -> bool | str:
    """ComfyUI leaves out the value of a dynamic choice that is none of its options."""
    return True if recipe is not None else f"unknown recipe: choose one of {', '.join(known)}"


def _check_prompt(prompt: str | None) -> bool | str:
    """None means that the prompt comes from another node and isn't known yet."""
    if prompt is None or prompt.strip():
        return True
    return "the prompt is empty: say what to make, for example 'a red cube is jumping'"


def _said(prompt: str) -> str:
    checked = _check_prompt(prompt)
    if checked is not True:
        raise RunError(checked)
    return prompt.strip()
