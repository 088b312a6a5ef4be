"""The node that changes how a scene moves."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy_api.latest import io

from ..dream4d_engine.documents import named
from ..dream4d_engine.fields.edit import MOST_STRENGTH, Box, MotionEdit, TimeMap, parse_boxes, parse_keys
from ..dream4d_engine.fields.stencil import Stencil, stencil
from ..dream4d_engine.surface import what_is_frozen
from ..dream4d_engine.training.reference.masks import read_mask
from ..dream4d_engine.training.reference.pixels import map_pixels
from .render import scene_on_device
from .session import RunError, say_on_node
from .sockets import CATEGORY, ScenePort, SceneValue


class Motion(io.ComfyNode):
    """A scene that moves otherwise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DMotion",
            display_name="Motion",
            category=CATEGORY,
            description="Changes how a scene moves, without training: more or less of it, parts that keep still, other "
            "times. What comes out is a scene as any other, to be rendered, previewed, exported, saved.",
            search_aliases=["motion strength", "freeze", "time remap", "ping-pong", "slow motion", "speed", "dream4d"],
            inputs=[
                ScenePort.Input("scene", tooltip="A moving scene. A still one is passed on as it is."),
                io.Mask.Input(
                    "freeze_mask",
                    optional=True,
                    tooltip="What lies behind its white keeps still, seen from the front: paint it over a fixed view "
                    "of Render Scene with its usual place, at strength 0.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=MOST_STRENGTH,
                    step=0.05,
                    tooltip="How far things go: 0 is still, 1 as trained. Beyond 1.5 the motion may tear.",
                ),
                io.Float.Input(
                    "speed",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.05,
                    tooltip="Plays of the animation in the time of one: 0.5 shows its first half, slowly.",
                ),
                io.Boolean.Input(
                    "ping_pong", default=False, tooltip="A play goes there and back, and ends as it began."
                ),
                io.String.Input(
                    "remap",
                    default="",
                    tooltip="Which moments of the animation a play shows when: pairs of times from 0 to 1, straight "
                    "between, as 0:0,0.5:0.2,1:1. Empty: all in their order.",
                ),
                io.String.Input(
                    "freeze",
                    default="",
                    multiline=True,
                    tooltip="Boxes that keep still, one a line: x0,y0,z0,x1,y1,z1, the lower and the upper corner, of "
                    "the scene at rest. It lies in -1,-1,-1,1,1,1; x points to the front, y to its left, z up.",
                ),
                io.Float.Input(
                    "freeze_border",
                    default=Box.border,
                    min=0.001,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="How far beside what is frozen the motion sets in; too narrow, and it tears there.",
                ),
            ],
            outputs=[ScenePort.Output("scene", display_name="scene", tooltip="The scene, moving otherwise.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, freeze: str | None = None, remap: str | None = None) -> bool | str:
        """Refuse boxes and times that are none; None isn't known yet."""
        faults = []
        for make in (lambda: _boxes(freeze or ""), lambda: _keys(remap or "")):
            try:
                make()
            except ValueError as error:
                faults.append(str(error))
        return "; ".join(faults) or True  # one text for both: ComfyUI lays it on each of them

    @classmethod
    def execute(
        cls,
        scene: SceneValue,
        strength: float,
        speed: float,
        ping_pong: bool,
        remap: str,
        freeze: str,
        freeze_border: float,
        freeze_mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        """Change a copy of the scene."""
        try:
            time = TimeMap(speed, ping_pong, _keys(remap))
            masks, note = ((), "") if freeze_mask is None else _mask(freeze_mask, freeze_border)
            edit = MotionEdit(strength, _boxes(freeze, freeze_border), masks, (time,))
            if scene.scene.deformation is None:
                say_on_node("the scene doesn't move: it is passed on as it is", cls.hidden.unique_id)
                return io.NodeOutput(scene)
            if edit.is_nothing:
                say_on_node("nothing is changed", cls.hidden.unique_id)
                return io.NodeOutput(scene)
            with scene_on_device(scene) as there:
                changed = there.edited(edit)
                frozen = what_is_frozen(there, changed) if edit.frozen or edit.masks else ""
                changed = changed.cpu()
        except ValueError as error:
            raise RunError(str(error)) from error
        say_on_node("\n".join(filter(None, (edit.in_words(), note, frozen))), cls.hidden.unique_id)
        said = replace(scene.provenance, edits=(*scene.provenance.edits, edit.in_words()))
        return io.NodeOutput(SceneValue(changed, said))


def _boxes(text: str, border: float = Box.border) -> tuple[Box, ...]:
    """What the widget freeze says."""
    with named("freeze"):
        return MotionEdit(frozen=parse_boxes(text, border)).frozen


def _keys(text: str) -> tuple[tuple[float, float], ...]:
    """What the widget remap says."""
    with named("remap"):
        return TimeMap(keys=parse_keys(text)).keys


def _mask(given: torch.Tensor, border: float) -> tuple[tuple[Stencil, ...], str]:
    """What one mask freezes, and what is to be said of it or ""."""
    read = read_mask(map_pixels(given, "freeze_mask"))
    with named("freeze_mask"):
        return (stencil(read.white, border),), read.note
