"""Make videos or images of a scene file."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..assets import load_scene
from ..cameras import CameraBatch, film_times, final_path, fixed_take, orbit
from ..export import VideoWriter, save_image
from ..machine import check_folder, check_memory, pick_device
from ..rendering import RenderOptions
from ..training.estimate import film_bytes
from ..training.loop import Interrupted
from . import results
from .command import Command
from .errors import UsageError
from .interrupts import stop_on_interrupt
from .options import FOLDER, INT, Edit, EditOptions, Machine, MachineOptions, Positional, arg, check_numbers, edited
from .progress import make_progress
from .terminal import say

Pass = Literal["rgb", "depth", "normals", "opacity", "displacement"]


@dataclass(frozen=True)
class Render:
    scene: Annotated[Positional[Path], arg(metavar="SCENE")]
    """The scene file."""
    out: Annotated[Path | None, FOLDER] = None
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
    samples: Annotated[int | None, INT] = None
    """Samples along a ray (default: the scene's own)."""
    overwrite: bool = False
    """Replace files of the same names."""
    edit: Edit = EditOptions()
    machine: Machine = MachineOptions()

    def __post_init__(self) -> None:
        check_numbers(self)


def run(options: Render) -> int:
    """Make videos and images of a scene file."""
    width, height = options.size
    passes = tuple(dict.fromkeys(options.passes))  # each once, in the order they were named
    if not passes or not (options.video or options.png):
        raise UsageError("nothing to render: give --passes, and leave --no-video away or add --png")
    scene, provenance = load_scene(options.scene, pick_device(options.machine.device))
    scene, _ = edited(scene, options.edit)
    if "displacement" in passes and scene.deformation is None:
        raise UsageError("the scene doesn't move: it has no displacement to show; leave that pass out")
    render_options = RenderOptions(
        n_samples=options.samples, normals="normals" in passes, displacement="displacement" in passes
    )
    cameras = _cameras(options, height, width, scene.loops)
    n_frames = cameras.shape[1]
    check_memory(film_bytes(height, width), f"a frame of {width}x{height}", "lower --size")
    out = options.out or options.scene.parent / "renders"
    videos = {name: out / f"{options.path}_{name}.mp4" for name in passes if options.video}
    folders = {name: out / f"{options.path}_{name}" for name in passes if options.png}
    results.require_new([*videos.values(), *folders.values()], options.overwrite, folders=list(folders.values()))
    check_folder(out, n_frames * len(passes) * height * width * 4)  # bytes, of which no image or video takes more
    if options.animate or options.path != "orbit":
        results.say_outside(scene)
    span = results.measure_range(scene, cameras, render_options)  # of all frames, or the brightness would flicker
    with stop_on_interrupt() as should_stop, make_progress() as progress, ExitStack() as stack:
        writers = {n: stack.enter_context(VideoWriter(p, options.fps, provenance.prompt)) for n, p in videos.items()}
        progress.begin("frames", n_frames)

        def on_frame(done: int) -> None:
            if should_stop():
                raise Interrupted("rendering", done, None)
            progress.update("frames", done)

        for index, output in enumerate(results.frames_of(scene, cameras, render_options, on_frame)):
            for name in passes:
                image = results.pass_image(output, name, span)
                if name in writers:
                    writers[name].add(image)
                if name in folders:
                    folders[name].mkdir(exist_ok=True)
                    save_image(folders[name] / f"{index:04}.png", image)
        for folder in folders.values():
            for path in folder.glob("[0-9]*.png"):  # a longer film may have left frames behind these
                if path.stem.isdecimal() and int(path.stem) >= n_frames:
                    path.unlink()
    say(f"{out}: {', '.join(path.name for path in [*videos.values(), *folders.values()])}")
    return 0


def _cameras(options: Render, height: int, width: int, loop: bool) -> CameraBatch:
    place = (options.elevation_deg, options.distance, options.fov_y_deg)
    if options.path == "fixed":
        return fixed_take(options.frames, height, width, options.azimuth_deg, *place, loop=loop)
    if options.path == "final":
        return final_path(height, width, results.FINAL_PARTS, options.frames, *place, loop=loop)
    time = film_times(options.frames, loop)[None] if options.animate else options.time
    return orbit(options.frames, height, width, *place, time=time, start_deg=options.azimuth_deg)


COMMAND = Command(Render, run)
