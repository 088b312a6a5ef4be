"""Change how a scene moves: its strength, what keeps still, its times; write that as another scene file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from ..assets import load_scene, save_scene
from ..machine import check_folder, pick_device
from ..surface import what_is_frozen
from . import results
from .command import Command
from .errors import UsageError
from .options import FILE, Edit, EditOptions, Machine, MachineOptions, Positional, arg, edited
from .terminal import say

_NOTHING = "nothing to change: give --motion-strength, --freeze, --freeze-mask, --speed, --ping-pong or --remap"


@dataclass(frozen=True)
class Motion:
    scene: Annotated[Positional[Path], arg(metavar="SCENE")]
    """The scene file."""
    out: Annotated[Path, FILE]
    """The scene file to write."""
    overwrite: bool = False
    """Replace the file if it is there."""
    edit: Edit = EditOptions()
    machine: Machine = MachineOptions()


def run(options: Motion) -> int:
    """Write a scene whose motion is changed."""
    if options.edit == EditOptions():
        raise UsageError(_NOTHING)
    results.require_new_scene(options.out, options.overwrite)
    scene, provenance = load_scene(options.scene, pick_device(options.machine.device))
    check_folder(options.out.parent, options.scene.stat().st_size)
    changed, said = edited(scene, options.edit)
    if not said:  # a remap of blanks
        raise UsageError(_NOTHING)
    frozen = what_is_frozen(scene, changed) if options.edit.freezes else ""
    save_scene(options.out, changed, replace(provenance, edits=(*provenance.edits, said)))
    say(f"{options.out}: {said}")
    if frozen:
        say(frozen)
    results.say_outside(changed)
    return 0


COMMAND = Command(Motion, run)
