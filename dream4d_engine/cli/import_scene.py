"""Make a scene file of a mesh (GLB, glTF, OBJ, PLY, STL), or of a checkpoint of the original Dream-in-4D."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from .. import locks
from ..assets import Provenance, save_scene
from ..dream_in_4d import import_checkpoint
from ..machine import WriteError, check_folder, check_memory, pick_device, versions
from ..meshes import READ_FORMATS, Front, MeshOrigin, Up, place, read_model
from ..meshes.record import SIZE
from ..scene import Scene
from ..training.checkpoint import CheckpointError, first_difference, load_checkpoint, set_aside
from ..training.config import MESH_RECIPES, MeshRecipe, find_recipe
from ..training.estimate import mesh_disk_bytes, mesh_memory_bytes
from ..training.loop import Interrupted, RunControl, StepReport
from ..training.mesh_fit import fit_mesh, mesh_recipe
from .command import Command
from .errors import UsageError
from .interrupts import Stopped, StopRequest, stop_on_interrupt
from .options import FILE, TEXT, Machine, MachineOptions, Positional, Seed, arg, check_numbers, optional
from .progress import make_progress
from .results import require_new_scene
from .run_folder import LOCK, sweep
from .terminal import say

_LOOK_STEPS = 100  # of the bar of the views
_UNFINISHED = ".unfinished"
"""At the end of a scene file's name: the folder with the state of its fit, until that is done."""


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
    """Replace the file if it is there, and what an import with other settings left unfinished for it."""
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
    require_new_scene(options.out, options.overwrite)
    scene, provenance = import_checkpoint(options.file)
    check_folder(options.out.parent, options.file.stat().st_size)
    save_scene(options.out, scene, replace(provenance, versions=versions()))
    _say_scene(options.out, scene)
    return 0


def _import_mesh(options: Import) -> int:
    require_new_scene(options.out, options.overwrite)
    device = pick_device(options.machine.device)
    recipe = mesh_recipe(device) if options.recipe is None else find_recipe(options.recipe, MESH_RECIPES)
    model = read_model(options.file, options.clip, options.time)
    placement = place(model, options.up, options.front, options.fill, recipe.scene.radius)
    origin = MeshOrigin(model.source, placement)
    check_folder(options.out.parent, mesh_disk_bytes(recipe))
    if device.type == "cpu":  # a GPU says itself where its memory ends; a CPU would swap, or be killed
        check_memory(mesh_memory_bytes(recipe), f"making a scene by the recipe {recipe.name!r}", "close other programs")
    for note in model.notes:
        say(f"note: {note}")
    say(f"{options.file.name}: {len(model.mesh.vertices):,} vertices, {len(model.mesh.faces):,} faces")
    with _unfinished(options, recipe, origin) as (control, should_stop), make_progress() as progress:
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
            control=replace(control, on_step=on_step, should_stop=should_stop),
            on_look=lambda share: progress.update("look", round(share * _LOOK_STEPS)),
        )
        made = Provenance("", recipe.name, options.seed, recipe.steps, versions(), mesh=origin)
        save_scene(options.out, scene, made)
    _say_scene(options.out, scene)
    say(f"made in {summary.seconds:.0f} s; dream4d animate {options.out} makes it move,")
    say(f"and dream4d export MOVING_SCENE --mesh {options.file} gives {options.file.name} that motion")
    return 0


@contextmanager
def _unfinished(options: Import, recipe: MeshRecipe, origin: MeshOrigin) -> Iterator[tuple[RunControl, StopRequest]]:
    """Keep the state of a fit in a folder beside the file that it makes; the same command goes on from it.

    It is removed when all inside is done. Raises InUse where another process makes the same file.
    """
    folder = options.out.with_name(options.out.name + _UNFINISHED)
    path = folder / f"{recipe.stage}.checkpoint"
    tree = {"stage": recipe.stage, "recipe": asdict(recipe), "seed": options.seed, "mesh": asdict(origin)}
    identity = json.loads(json.dumps(tree))  # as a checkpoint gives it back
    try:
        folder.mkdir(exist_ok=True)
        held = locks.take(folder / LOCK, options.out)
    except OSError as error:
        raise UsageError(f"can't write into {folder} ({error.strerror or error}); choose another --out") from error
    try:
        sweep(folder, ["*"])  # no other process writes here: the lock is ours
        _look_into(path, identity, options.overwrite)
        with stop_on_interrupt() as should_stop:
            try:
                yield RunControl(path, identity), should_stop
            except Interrupted as stop:
                raise Stopped(_stopped(stop, path), should_stop.code) from stop
            except CheckpointError as error:
                kept = set_aside(path) if error.path else None
                raise CheckpointError(f"{error}; {_kept(kept)}the same command starts over") from error
            except WriteError as error:
                way_on = "the same command goes on from what was saved" if path.exists() else "nothing was saved"
                raise WriteError(f"{error}; {way_on}") from error
        for done in folder.glob(f"{path.name}*"):  # what was set aside, too
            done.unlink()
    finally:
        held.release()
        with contextlib.suppress(OSError):  # it stays where something is in it
            folder.rmdir()


def _look_into(path: Path, identity: dict, overwrite: bool) -> None:
    """Say from where a fit goes on; put away, or refuse, what it can't go on from."""
    if not path.exists():
        return
    try:
        saved = load_checkpoint(path)
    except CheckpointError as error:
        if error.path is None and not overwrite:  # nothing is wrong with the file
            raise UsageError(f"{error}, or --overwrite it") from error
        say(f"note: {error}; {_kept(set_aside(path))}the fit starts over", error=True)
        return
    difference = first_difference(identity, saved.identity)
    if difference is None:
        say(f"going on from step {saved.step}, saved in {path.parent}")
    elif overwrite:
        path.unlink()
    else:
        raise UsageError(
            f"{path.parent} holds an unfinished fit with other settings: {difference}; go on with those, --overwrite "
            "it, or choose another --out"
        )


def _stopped(stop: Interrupted, path: Path) -> str:
    where = f"stopped in {stop.stage}, step {stop.step}" if stop.step else f"stopped in {stop.stage}"
    if path.exists():
        return f"{where}; what is done is saved in {path.parent}: the same command goes on from there"
    return f"{where} before its first step: nothing was made yet"


def _kept(path: Path | None) -> str:
    return f"it is kept as {path.name}, and " if path else ""


def _say_scene(path: Path, scene: Scene) -> None:
    kind = "still" if scene.deformation is None else "moving"
    n = sum(p.numel() for p in scene.parameters())
    power = min(int(math.log10(max(n, 1))) // 3, 3)  # of 1000
    count = f"{n / 1000**power:.1f} {['', 'thousand', 'million', 'billion'][power]}" if power else str(n)
    say(f"{path}: a {kind} scene of {count} parameters")


COMMAND = Command(Import, run)
