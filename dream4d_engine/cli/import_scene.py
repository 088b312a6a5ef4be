"""Make a scene file of a mesh (GLB, glTF, OBJ, PLY, STL), or of a checkpoint of the original Dream-in-4D."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from ..assets import Provenance, save_scene
from ..dream_in_4d import import_checkpoint
from ..machine import check_folder, pick_device, versions
from ..meshes import READ_FORMATS, Front, MeshOrigin, Up, place, read_model
from ..meshes.record import SIZE
from ..scene import Scene
from ..training.config import MESH_RECIPES, find_recipe
from ..training.loop import RunControl, StepReport
from ..training.mesh_fit import fit_mesh, mesh_recipe
from .command import Command
from .errors import UsageError
from .interrupts import stop_on_interrupt
from .options import FILE, TEXT, Machine, MachineOptions, Positional, Seed, arg, check_numbers, optional
from .progress import make_progress
from .results import require_new
from .terminal import say

_LOOK_STEPS = 100  # of the bar of the views


@dataclass(frozen=True)
class Import:
    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """The mesh (.glb, .gltf, .obj, .ply, .stl), or the checkpoint (a torch file)."""
    out: Annotated[Path, FILE]
    """The scene file to write."""
    up: Annotated[Up | None, optional("y|z")] = None
    """Which axis of the mesh points up (default: y, as in GLB and OBJ; z for PLY and STL)."""
    front: Annotated[Front | None, optional("AXIS")] = None
    """Where the mesh's front points: +x, -x, +y, -y, +z or -z (default: +z where y is up, +x where z is)."""
    clip: Annotated[str | None, TEXT] = None
    """The animation of the file that poses the mesh (default: as it is at rest)."""
    time: float = 0.0
    """Seconds into the clip."""
    fill: float = SIZE
    """Share of the scene's box that the mesh's longest side takes; the rest is room to move."""
    recipe: Annotated[str | None, optional("NAME")] = None
    """mesh, or mesh-quick for two CPU cores (default: what suits the device)."""
    seed: Seed = 0
    overwrite: bool = False
    """Replace the file if it is there."""
    machine: Machine = MachineOptions()

    def __post_init__(self) -> None:
        check_numbers(self, {"time": (0, 10**6), "fill": (0.01, 1)})

    @property
    def is_mesh(self) -> bool:
        """Whether the file's name says that it is a mesh."""
        return self.file.suffix.lower().removeprefix(".") in READ_FORMATS


def run(options: Import) -> int:
    """Make a scene file of a mesh or of a checkpoint."""
    if options.is_mesh:
        return _import_mesh(options)
    defaults = Import(options.file, options.out)
    for name in ("up", "front", "clip", "time", "fill", "recipe"):
        if getattr(options, name) != getattr(defaults, name):
            known = ", ".join(f".{form}" for form in READ_FORMATS)
            raise UsageError(f"--{name} is for meshes ({known}), and {options.file.name} is none by its name")
    require_new([options.out], options.overwrite)
    scene, provenance = import_checkpoint(options.file)
    check_folder(options.out.parent, options.file.stat().st_size)
    save_scene(options.out, scene, replace(provenance, versions=versions()))
    _say_scene(options.out, scene)
    return 0


def _import_mesh(options: Import) -> int:
    require_new([options.out], options.overwrite)
    device = pick_device(options.machine.device)
    recipe = mesh_recipe(device) if options.recipe is None else find_recipe(options.recipe, MESH_RECIPES)
    model = read_model(options.file, options.clip, options.time)
    placement = place(model, options.up, options.front, options.fill, recipe.scene.radius)
    check_folder(options.out.parent, 2**28)
    for note in model.notes:
        say(f"note: {note}")
    say(f"{options.file.name}: {len(model.mesh.vertices):,} vertices, {len(model.mesh.faces):,} faces")
    with stop_on_interrupt() as should_stop, make_progress() as progress:
        progress.begin("look", _LOOK_STEPS)
        progress.begin(recipe.stage, recipe.steps)

        def on_step(report: StepReport, _: Scene) -> None:
            progress.update(recipe.stage, report.step, report.loss, report.remaining, report.warning)

        scene, summary = fit_mesh(
            model,
            placement,
            recipe,
            seed=options.seed,
            device=device,
            control=RunControl(on_step=on_step, should_stop=should_stop),
            on_look=lambda share: progress.update("look", round(share * _LOOK_STEPS)),
        )
    made = Provenance("", recipe.name, options.seed, recipe.steps, versions(), mesh=MeshOrigin(model.source, placement))
    save_scene(options.out, scene, made)
    _say_scene(options.out, scene)
    say(f"made in {summary.seconds:.0f} s; dream4d animate {options.out} makes it move,")
    say(f"and dream4d export MOVING_SCENE --mesh {options.file} gives {options.file.name} that motion")
    return 0


def _say_scene(path: Path, scene: Scene) -> None:
    kind = "still" if scene.deformation is None else "moving"
    n = sum(p.numel() for p in scene.parameters())
    power = min(int(math.log10(max(n, 1))) // 3, 3)  # of 1000
    count = f"{n / 1000**power:.1f} {['', 'thousand', 'million', 'billion'][power]}" if power else str(n)
    say(f"{path}: a {kind} scene of {count} parameters")


COMMAND = Command(Import, run)
