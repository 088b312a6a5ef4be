"""What a run shows of its result: videos, a sheet of images, measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..cameras import CameraBatch, film_times, final_path, make_cameras, orbit
from ..export import contact_sheet, save_image, write_video
from ..mesh import MeshError
from ..rendering import RenderOptions, RenderOutput, render_chunked
from ..rendering.shading import displacement_image, image_of
from ..scene import Scene
from ..surface import SurfaceMotion, follow_surface, leaves_box, measure_motion, outside_note
from ..toyworld.captions import parse_caption
from ..toyworld.evaluate import evaluate_later, evaluate_scene
from .errors import UsageError
from .options import ImageOptions
from .terminal import say

ELEVATION_DEG, DISTANCE, FOV_Y_DEG = 15.0, 3.0, 40.0
SHEET_AZIMUTHS_DEG, SHEET_TIMES, SHEET_SIZE = (0, 90, 180, 270), 5, 96
FINAL_PARTS = 8
_PREVIEW_FRAMES, _PREVIEW_SIZE = 12, 64

OnFrame = Callable[[int], None]
"""Called with the number of frames done; may raise to stop."""


@dataclass(frozen=True)
class PassRange:
    """What a whole video maps to full brightness."""

    near: float  # distance from the camera, world units
    far: float
    largest: float  # length of a displacement


def frames_of(scene: Scene, cameras: CameraBatch, options: RenderOptions, on_frame: OnFrame) -> Iterator[RenderOutput]:
    """Render the frames of the first group one by one: no more than one is ever held."""
    for index in range(cameras.shape[1]):
        yield render_chunked(scene, cameras.frames(index, index + 1), options)
        on_frame(index + 1)


def measure_range(scene: Scene, cameras: CameraBatch, options: RenderOptions) -> PassRange:
    """Find the range of a video from some small frames, so that its brightness doesn't flicker."""
    n_frames = cameras.shape[1]
    every = torch.linspace(0, n_frames - 1, min(_PREVIEW_FRAMES, n_frames)).round().long().tolist()
    share = min(1.0, _PREVIEW_SIZE / max(cameras.height, cameras.width))
    small = cameras.resized(max(1, round(cameras.height * share)), max(1, round(cameras.width * share)))
    near, far, largest = math.inf, 0.0, 0.0
    for index in every:
        output = render_chunked(scene, small.frames(index, index + 1), options)
        solid = output.opacity > 0.5  # at edges a distance means little
        if solid.any():
            distance = (output.depth / output.opacity.clamp_min(1e-6))[solid]
            near, far = min(near, float(distance.min())), max(far, float(distance.max()))
        if output.displacement is not None:
            largest = max(largest, float(output.displacement.abs().max()))
    return PassRange(near, far, largest) if near < math.inf else PassRange(0.0, 1.0, largest)


def pass_image(output: RenderOutput, name: str, span: PassRange) -> Tensor:
    """One pass of a rendered frame as an image [H, W, 3] in [0, 1]."""
    if name == "depth":  # near bright, far dark, nothing black
        distance = output.depth / output.opacity.clamp_min(1e-6)  # depth is a sum of weights, which add up to opacity
        bright = 1 - 0.8 * (distance - span.near) / max(span.far - span.near, 1e-6)
        return (bright.clamp(0, 1) * output.opacity)[0, 0].expand(-1, -1, 3)
    if name == "displacement":
        if output.displacement is None:
            raise ValueError("the rendering holds no displacement")
        return displacement_image(output.displacement, span.largest)[0, 0]
    return image_of(output, name)[0, 0]


def save_scene_video(
    path: Path, scene: Scene, cameras: CameraBatch, fps: float, samples: int | None, title: str, on_frame: OnFrame
) -> None:
    """Film the scene."""
    options = RenderOptions(n_samples=samples)
    frames = (output.rgb[0, 0] for output in frames_of(scene, cameras, options, on_frame))
    write_video(path, frames, fps, title)


def orbit_cameras(images: ImageOptions) -> CameraBatch:
    """Once around the still object."""
    return orbit(images.orbit_frames, images.size, images.size, ELEVATION_DEG, DISTANCE, FOV_Y_DEG)


def final_cameras(images: ImageOptions, scene: Scene) -> CameraBatch:
    """The final video's path; a longer animation is filmed at the same pace."""
    place, n_frames = (ELEVATION_DEG, DISTANCE, FOV_Y_DEG), round(images.part_frames * scene.length)
    return final_path(images.size, images.size, FINAL_PARTS, n_frames, *place, loop=scene.loops)


def save_contact_sheet(path: Path, scene: Scene, title: str, samples: int | None) -> None:
    """Write a sheet of views (rows, by azimuth) and times (columns; one for a scene that doesn't move)."""
    times = film_times(SHEET_TIMES if scene.deformation is not None else 1, scene.loops)
    azimuths = torch.tensor(SHEET_AZIMUTHS_DEG).float().deg2rad()[:, None]  # [B, 1] against times [1, F]
    cameras = make_cameras(
        azimuths,
        math.radians(ELEVATION_DEG),
        DISTANCE,
        math.radians(FOV_Y_DEG),
        times[None],
        SHEET_SIZE,
        SHEET_SIZE,
    )
    images = render_chunked(scene, cameras, RenderOptions(n_samples=samples)).rgb
    rows = [f"azimuth {azimuth}°" for azimuth in SHEET_AZIMUTHS_DEG]
    save_image(path, contact_sheet(images, rows, [f"time {t:g}" for t in times.tolist()], title))


def measure(
    scene: Scene, prompt: str, of_a_mesh: bool = False, on_progress: Callable[[float], None] | None = None
) -> tuple[dict, list[str]]:
    """Measure a result: against the truth if the prompt is a caption of the toy world, how much it moves if it does.

    `of_a_mesh`: it was made from somebody's mesh, which is no object of the toy world whatever the prompt says.
    `on_progress` is told the share done of what takes longest. Returns the measures, ready for JSON, and lines about
    them for people.
    """
    found: dict = {"prompt": prompt, "scene": _scene_measures(scene)}
    motion: SurfaceMotion | None = None
    said = []
    if scene.deformation is not None:
        try:
            motion = follow_surface(scene, on_progress=on_progress)
            moves = measure_motion(scene, motion)
            found["motion"], said = moves.to_dict(), [moves.line]
        except MeshError as error:  # all else of the run is there, and is not to be lost for it
            found["motion"], said = None, [f"how much it moves can't be told: {error}"]
    try:
        caption = None if of_a_mesh else parse_caption(prompt)
    except ValueError:  # a prompt of the wide world
        caption = None
    if caption is None:  # no truth to compare with
        return found, [f"the object covers {found['scene']['coverage']:.0%} of the image", *said]
    truth = evaluate_scene(scene, caption, n_times=0 if motion is None else 8, motion=motion)
    found, lines = found | {"truth": truth.to_dict()}, [truth.summary()]
    if later := evaluate_later(scene, truth):
        found["later"] = [asdict(one) for one in later]
        lines += [f"take {i}: {one.summary()}" for i, one in enumerate(later, 2)]
    return found, [*lines, *said]


def _scene_measures(scene: Scene) -> dict:
    """How much of the images the object covers, and the zoom of its deformation."""
    cameras = orbit(8, 64, 64, ELEVATION_DEG, DISTANCE, FOV_Y_DEG)
    moving, deformation = scene.deformation is not None, scene.config.deformation
    times = film_times(8, scene.loops)[None] if moving else cameras.time
    opacity = render_chunked(scene, cameras.at_time(times)).opacity
    return {
        "coverage": float((opacity > 0.5).float().mean()),
        "mean_opacity": float(opacity.mean()),
        "deformation_scale": None if deformation is None else deformation.scale,
    }


def say_outside(scene: Scene) -> None:
    """Say how much of the motion images cut off, where it is stronger than it was trained; a look takes a second."""
    if scene.edit.strength <= 1:  # what training came to was measured then
        return
    note = outside_note(leaves_box(scene), "the surface's")
    if note:
        say(f"note: {note}")


def require_new_scene(path: Path, overwrite: bool) -> None:
    """Refuse a path that is taken, or that isn't named as a scene file: by its name it would be taken for a mesh."""
    require_new([path], overwrite)
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"--out {path} can't be: a scene is written here, so end it in .safetensors")


def require_new(paths: Sequence[Path], overwrite: bool, folders: Sequence[Path] = ()) -> None:
    """Refuse paths that are taken, even with `overwrite` by what is no file, or no folder for those of `folders`."""
    present = [path for path in paths if path.exists()]
    for path in present:
        if path.is_dir() != (path in folders):
            kinds = ("file", "folder") if path in folders else ("folder", "file")
            raise UsageError(f"{path} is a {kinds[0]} where a {kinds[1]} belongs: choose another --out")
    if present and not overwrite:
        raise UsageError(f"{present[0]} exists: choose another --out, or --overwrite")
