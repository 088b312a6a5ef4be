"""The node that turns a scene into images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from fractions import Fraction

import comfy.model_management as management
import torch
from comfy_api.latest import InputImpl, Types, io

from ..dream4d_engine.cameras import CameraBatch
from ..dream4d_engine.machine import check_memory
from ..dream4d_engine.rendering import RenderOptions, RenderOutput, render_chunked
from ..dream4d_engine.rendering.shading import image_of
from ..dream4d_engine.scene import Scene
from ..dream4d_engine.surface import leaves_box, outside_note
from ..dream4d_engine.training.estimate import film_bytes
from .cameras import CAMERAS, CONNECTED, FINAL_PARTS, FINAL_PATH, path_cameras, unknown_cameras, viewer_cameras
from .checks import check_ranges, check_types, first_complaint, require
from .memory import make_room
from .session import RunError, gradients, interrupt_if_asked, say_on_node
from .sockets import CATEGORY, ScenePort, SceneValue

_ROOM = 2**31
"""Bytes of GPU memory asked for before rendering."""
_NO_CAMERA = "connect the camera output of a 3D viewer to the socket camera, or choose other cameras"


def _place() -> list[io.Input]:
    """Where the cameras stand, and how much they see."""
    return [
        io.Float.Input(
            "azimuth",
            default=0.0,
            min=-360.0,
            max=360.0,
            step=1.0,
            tooltip="Where the fixed view stands and the orbit starts, degrees; 0 is the front, 90 its left.",
        ),
        io.Float.Input(
            "elevation",
            default=15.0,
            min=-90.0,
            max=90.0,
            step=1.0,
            tooltip="Height of the cameras above the object's middle, degrees.",
        ),
        io.Float.Input(
            "distance",
            default=3.0,
            min=0.1,
            max=100.0,
            step=0.1,
            advanced=True,
            tooltip="Distance of the cameras; the scene's box reaches from -1 to 1.",
        ),
        io.Float.Input(
            "field_of_view",
            default=40.0,
            min=1.0,
            max=170.0,
            step=1.0,
            advanced=True,
            tooltip="Vertical angle that the cameras see, degrees.",
        ),
    ]


class Render(io.ComfyNode):
    """A scene seen by cameras."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DRender",
            display_name="Render Scene",
            category=CATEGORY,
            description="Films a scene: colours, the object's mask, depth, normals and displacement, as images and "
            "as a video.",
            search_aliases=["render 4d", "render 3d", "turntable", "orbit", "depth pass", "normal pass", "dream4d"],
            inputs=[
                ScenePort.Input("scene", tooltip="A still or a moving scene."),
                io.Load3DCamera.Input(
                    "camera", optional=True, tooltip="The camera of a 3D viewer, for the choice 'connected camera'."
                ),
                io.Combo.Input(
                    "cameras",
                    options=list(CAMERAS),
                    default=FINAL_PATH,
                    tooltip=f"final path: {FINAL_PARTS} parts, standing still and turning to the next place by turns, "
                    "the animation once in each. orbit: once around, the animation once. fixed view: from one place, "
                    "the animation once. connected camera: the same from the camera of a 3D viewer.",
                ),
                io.Int.Input(
                    "frames",
                    default=24,
                    min=1,
                    max=2000,
                    tooltip=f"Frames for once through the animation; the final path has {FINAL_PARTS} times as many.",
                ),
                io.Int.Input("width", default=128, min=1, max=4096, tooltip="Width of the images, pixels."),
                io.Int.Input("height", default=128, min=1, max=4096, tooltip="Height of the images, pixels."),
                io.Float.Input(
                    "frame_rate", default=24.0, min=0.1, max=1000.0, step=0.1, tooltip="Frames per second of the video."
                ),
                io.Boolean.Input(
                    "normals",
                    default=False,
                    tooltip="Make the normals too: several times the work. The output is empty without it.",
                ),
                *_place(),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="The frames."),
                io.Mask.Output("mask", display_name="mask", tooltip="White where the object is."),
                io.Image.Output("depth", display_name="depth", tooltip="Grey by distance: near is bright."),
                io.Image.Output(
                    "normal_images", display_name="normals", tooltip="Directions of the surface as colours."
                ),
                io.Image.Output(
                    "displacement",
                    display_name="displacement",
                    tooltip="How far each point has moved, as colours around mid grey; a still scene is grey.",
                ),
                io.Float.Output("fps", display_name="frame_rate", tooltip="Frames per second."),
                io.Video.Output(
                    "video",
                    display_name="video",
                    tooltip="The frames as a video. Videos have even sides: the last column or row of an odd one is "
                    "repeated.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        input_types: Mapping[str, str],
        cameras: str | None = None,
        frames: int | None = None,
        width: int | None = None,
        height: int | None = None,
        frame_rate: float | None = None,
        azimuth: float | None = None,
        elevation: float | None = None,
        distance: float | None = None,
        field_of_view: float | None = None,
    ) -> bool | str:
        """Refuse sockets of another kind, and films that no camera is there for or that don't fit into the memory."""
        # All are named, though most are only compared with their ranges: with **numbers ComfyUI would compare no input
        # of the node itself any more, and put every complaint beside scene, camera and normals too.
        unseen = cameras == CONNECTED and "camera" not in input_types
        return first_complaint(
            check_types(cls, input_types),
            check_cameras(cameras),
            _NO_CAMERA if unseen else True,
            check_ranges(cls, frames=frames, width=width, height=height, frame_rate=frame_rate),
            check_ranges(cls, azimuth=azimuth, elevation=elevation, distance=distance, field_of_view=field_of_view),
            check_film(cameras, frames, width, height),
        )

    @classmethod
    def execute(
        cls,
        scene: SceneValue,
        cameras: str,
        frames: int,
        width: int,
        height: int,
        frame_rate: float,
        normals: bool,
        azimuth: float,
        elevation: float,
        distance: float,
        field_of_view: float,
        camera: Mapping | None = None,
    ) -> io.NodeOutput:
        """Render all passes."""
        require(check_cameras(cameras), check_film(cameras, frames, width, height))
        if cameras == CONNECTED:
            if camera is None:
                raise RunError(_NO_CAMERA)
            batch = viewer_cameras(camera, frames, height, width, scene.scene.loops)
        else:
            batch = path_cameras(
                cameras,
                frames,
                (height, width),
                azimuth_deg=azimuth,
                elevation_deg=elevation,
                distance=distance,
                fov_deg=field_of_view,
                loop=scene.scene.loops,
            )
        output = render_passes(scene, batch, normals, cls.hidden.unique_id)
        cut_off = outside_line(scene)
        if cut_off:
            say_on_node(cut_off, cls.hidden.unique_id)
        images = image_of(output, "rgb")[0]
        rate = Fraction(frame_rate).limit_denominator(1000)
        film = Types.VideoComponents(images=even_sides(images), audio=None, frame_rate=rate)
        return io.NodeOutput(
            images,
            output.opacity[0, ..., 0].clamp(0, 1),
            image_of(output, "depth")[0],
            image_of(output, "normals")[0] if normals else _nothing("normals are switched off in Render Scene"),
            torch.full_like(images, 0.5) if output.displacement is None else image_of(output, "displacement")[0],
            frame_rate,
            InputImpl.VideoFromComponents(film),
        )


def check_cameras(cameras: str | None) -> bool | str:
    """Refuse cameras that there are none of; None: they are linked, and not known yet."""
    known = cameras is None or cameras in CAMERAS
    return True if known else unknown_cameras(cameras)


def check_film(cameras: str | None, frames: int | None, width: int | None, height: int | None) -> bool | str:
    """Return True, or why so many and so large frames can't be made; what isn't known yet passes."""
    if cameras is None or frames is None or width is None or height is None:
        return True
    n_frames = frames * (FINAL_PARTS if cameras == FINAL_PATH else 1)
    try:
        check_memory(
            n_frames * film_bytes(height, width),
            f"rendering {n_frames} frames of {width}x{height}",
            "lower frames, width or height",
        )
    except ValueError as error:
        return str(error)
    return True


def even_sides(images: torch.Tensor) -> torch.Tensor:
    """Repeat the last row or column of images [F, H, W, 3] where a side is odd: encoders of videos take even ones."""
    height, width = images.shape[1:3]
    if height % 2:
        images = torch.cat((images, images[:, -1:]), 1)
    if width % 2:
        images = torch.cat((images, images[:, :, -1:]), 2)
    return images


def render_passes(scene: SceneValue, cameras: CameraBatch, normals: bool, node_id: str | None) -> RenderOutput:
    """Render frame by frame on ComfyUI's device with a progress bar; Cancel stops between chunks of rays.

    The images are on the device where ComfyUI wants them, usually the CPU.
    """
    from comfy.utils import ProgressBar

    n_frames = cameras.shape[1]
    bar = ProgressBar(n_frames, node_id=node_id)
    options = RenderOptions(normals=normals, displacement=scene.scene.deformation is not None)
    frames = []
    with scene_on_device(scene) as there:
        for index in range(n_frames):
            shot = cameras.frames(index, index + 1)
            frames.append(_moved(render_shot(there, shot, options), management.intermediate_device()))
            bar.update_absolute(index + 1)
    return _joined(frames)


def outside_line(value: SceneValue) -> str:
    """What to say of a motion that leaves the scene's box, or "": as it was measured before, else of a stronger one."""
    share = None if value.motion is None else value.motion.outside
    if share is None and value.scene.edit.strength > 1:  # what training came to was said then
        with scene_on_device(value) as there:
            share = leaves_box(there)
    return outside_note(share or 0.0, "the surface's")


def render_shot(scene: Scene, cameras: CameraBatch, options: RenderOptions) -> RenderOutput:
    """Render some frames; Cancel stops between chunks of rays."""
    chunk_rays = 2**13 if scene.device.type == "cpu" else None  # a GPU is fast enough with many
    return render_chunked(scene, cameras, options, chunk_rays, on_progress=lambda _: interrupt_if_asked())


def _moved(output: RenderOutput, device: torch.device) -> RenderOutput:
    columns = {f.name: getattr(output, f.name) for f in fields(RenderOutput)}
    moved = {name: value.to(device) for name, value in columns.items() if isinstance(value, torch.Tensor)}
    return replace(output, samples=output.samples, **moved)


@contextmanager
def scene_on_device(value: SceneValue) -> Iterator[Scene]:
    """Give the scene on ComfyUI's device, to be rendered; the one that nodes share stays where it is."""
    device = management.get_torch_device()
    with gradients(), torch.no_grad():
        there = value.scene
        if device.type != "cpu":
            make_room(_ROOM, device)
            there = value.scene.clone().to(device)
        yield there


def _joined(frames: list[RenderOutput]) -> RenderOutput:
    """One output of all frames; what a rendering of many has not is left out."""
    columns = {f.name: [getattr(frame, f.name) for frame in frames] for f in fields(RenderOutput)}
    given = {name: parts for name, parts in columns.items() if isinstance(parts[0], torch.Tensor)}
    return RenderOutput(samples=None, **{name: torch.cat(parts, 1) for name, parts in given.items()})


def _nothing(reason: str):
    """An output that stops whoever uses it, with a message."""
    from comfy_execution.graph import ExecutionBlocker

    return ExecutionBlocker(reason)
