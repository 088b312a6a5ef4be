"""Write a scene as a mesh: a GLB that moves (or your own, given its motion), or a moment as OBJ, PLY or STL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..assets import load_scene
from ..documents import named
from ..export import (
    ROOM,
    ExportOptions,
    GltfOptions,
    MeshFormat,
    clip_times,
    export_scene,
    mesh_format,
    own_mesh_glb,
    require_own_file,
)
from ..machine import check_folder, pick_device, write_atomically
from ..meshes import READ_FORMATS, read_model
from ..priors.formats.weights import human_size
from ..scene import Scene
from ..surface import SurfaceOptions
from ..training.loop import Interrupted
from . import results
from .command import Command
from .errors import UsageError
from .interrupts import stop_on_interrupt
from .options import (
    FILE,
    FLOAT,
    Edit,
    EditOptions,
    Machine,
    MachineOptions,
    Positional,
    arg,
    check_numbers,
    edited,
    optional,
)
from .progress import make_progress
from .terminal import say

_STEPS = 100  # of the progress bar


@dataclass(frozen=True)
class Export:
    scene: Annotated[Positional[Path], arg(metavar="SCENE")]
    """The scene file."""
    out: Annotated[Path | None, FILE] = None
    """The file to write (default: the scene's name with the format's suffix, beside it)."""
    format: Annotated[MeshFormat | None, optional("glb|obj|ply|stl")] = None
    """What to write (default: as the suffix of --out says, else glb)."""
    mesh: Annotated[Path | None, FILE] = None
    """The file that the scene was made from by `dream4d import`: its own vertices get the motion, as a GLB that keeps
    its materials and images."""
    times: int = 24
    """Moments that the surface is followed through; 1 for a still GLB."""
    time: float = 0.0
    """The moment, 0 to 1, that a still file shows."""
    resolution: int = 128
    """Cells along the object's longest side."""
    faces: int = 20_000
    """Faces at most; 0 for all that are found."""
    threshold: Annotated[float | None, FLOAT] = None
    """The density that is the surface (default: the one whose silhouettes are the renderer's)."""
    smoothing: int = 4
    """Rounds of smoothing."""
    texture: int = 0
    """Side of a texture to bake, in texels; 0 for colours at the vertices."""
    duration: float = 2.0
    """Seconds that the animation takes."""
    bounce: bool = False
    """Play forwards, then backwards."""
    error: float = 0.004
    """How far places between key frames may be off, in object sizes."""
    quantize: bool = True
    """Keep the motion in 16 and 8 bits, not in 32."""
    lit: bool = False
    """A material that takes the viewer's light, instead of colours as they are."""
    overwrite: bool = False
    """Replace a file of the same name."""
    edit: Edit = EditOptions()
    machine: Machine = MachineOptions()

    def __post_init__(self) -> None:
        check_numbers(self)


def run(options: Export) -> int:
    """Write a scene as a mesh's file."""
    if options.scene.suffix.lower().removeprefix(".") in READ_FORMATS:
        raise UsageError(
            f"{options.scene} is a mesh, and export writes scenes: dream4d import {options.scene} makes one of it"
        )
    if options.mesh is not None:
        return _run_own(options, options.mesh)
    form = options.format or (mesh_format(options.out) if options.out else "glb")
    if form is None:
        raise UsageError(
            f"{options.out} names no format for meshes: end it in .glb, .obj, .ply or .stl, or add --format"
        )
    out = options.out or options.scene.with_suffix(f".{form}")
    results.require_new([out], options.overwrite)
    export_options = ExportOptions(
        n_times=options.times,
        time=options.time,
        texture=options.texture,
        surface=SurfaceOptions(options.resolution, options.threshold, options.faces, options.smoothing),
        gltf=_gltf(options),
    )
    scene, _ = edited(load_scene(options.scene, pick_device(options.machine.device))[0], options.edit)
    moving = form == "glb" and options.times > 1 and scene.deformation is not None
    if moving:
        _check_times(scene, options.times)
    check_folder(out.parent, ROOM)
    with _progress() as on_progress:
        report = export_scene(scene, out, export_options, form, on_progress)
    for note in report.made.notes:
        say(f"note: {note}")
    mesh = report.made.mesh
    keys = _keys(report.n_keys) if moving else ""
    say(f"{out}: {len(mesh.vertices):,} vertices, {len(mesh.faces):,} faces{keys}, {human_size(report.n_bytes)}")
    return 0


_OF_SURFACES = ("time", "resolution", "faces", "threshold", "smoothing", "texture", "lit")
"""Flags that say how a surface is made, or what it looks like."""


def _run_own(options: Export, mesh: Path) -> int:
    """Write the motion into the mesh that the scene was made from."""
    defaults = Export(options.scene)
    vain = next((name for name in _OF_SURFACES if getattr(options, name) != getattr(defaults, name)), None)
    if vain is not None:
        raise UsageError(f"--{vain} means nothing with --mesh, which keeps its own shape and looks: leave it out")
    if options.times < 2:
        raise UsageError("--times must be 2 or more with --mesh, which is given motion")
    out = options.out or options.scene.with_name(f"{mesh.stem}_moving.glb")
    if out.suffix.lower() != ".glb" or options.format not in (None, "glb"):
        raise UsageError(f"{out} can't be: a mesh that moves is written as GLB, so end --out in .glb")
    if out.exists() and mesh.exists() and out.samefile(mesh):
        raise UsageError(f"{out} is the mesh itself: choose another --out")
    results.require_new([out], options.overwrite)
    scene, provenance = load_scene(options.scene, pick_device(options.machine.device))
    origin = require_own_file(mesh, provenance.first_mesh)
    model = read_model(mesh, origin.source.clip, origin.source.time)
    check_folder(out.parent, mesh.stat().st_size + ROOM)
    scene, _ = edited(scene, options.edit)
    _check_times(scene, options.times)
    with _progress() as on_progress:
        made = own_mesh_glb(scene, origin, model, options.times, _gltf(options), on_progress)
    write_atomically(out, made.data)
    for note in made.notes:
        say(f"note: {note}")
    keys, size = _keys(made.n_keys), human_size(len(made.data))
    say(f"{out}: {len(model.mesh.vertices):,} vertices of {mesh.name}{keys}, {size}")
    return 0


def _check_times(scene: Scene, n_times: int) -> None:
    with named("--times"):
        clip_times(scene, n_times)


def _keys(n: int) -> str:
    return f", {n} key frames" if n else ", which does not move"


def _gltf(options: Export) -> GltfOptions:
    return GltfOptions(options.duration, options.bounce, options.error, options.quantize, options.lit)


@contextmanager
def _progress() -> Iterator[Callable[[float], None]]:
    """Show how far the work is: call it with the share done; it raises Interrupted where a signal asked to stop."""
    with stop_on_interrupt() as should_stop, make_progress() as progress:
        progress.begin("mesh", _STEPS)

        def on_progress(share: float) -> None:
            if should_stop():
                raise Interrupted("the export", int(share * _STEPS), None)
            progress.update("mesh", int(share * _STEPS))

        yield on_progress


COMMAND = Command(Export, run)
