"""Turn a checkpoint of the original Dream-in-4D into a scene file."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from ..assets import save_scene
from ..dream_in_4d import import_checkpoint
from ..machine import check_folder, versions
from .command import Command
from .options import FILE, Machine, MachineOptions, Positional, arg
from .results import require_new
from .terminal import say


@dataclass(frozen=True)
class Import:
    checkpoint: Annotated[Positional[Path], arg(metavar="CKPT")]
    """The checkpoint (a torch file)."""
    out: Annotated[Path, FILE]
    """The scene file to write."""
    overwrite: bool = False
    """Replace the file if it is there."""
    machine: Machine = MachineOptions()


def run(options: Import) -> int:
    """Turn a checkpoint of the original into a scene file."""
    require_new([options.out], options.overwrite)
    scene, provenance = import_checkpoint(options.checkpoint)
    check_folder(options.out.parent, options.checkpoint.stat().st_size)
    save_scene(options.out, scene, replace(provenance, versions=versions()))
    kind = "still" if scene.deformation is None else "moving"
    n = sum(p.numel() for p in scene.parameters())
    power = min(int(math.log10(max(n, 1))) // 3, 3)  # of 1000
    count = f"{n / 1000**power:.1f} {['', 'thousand', 'million', 'billion'][power]}" if power else str(n)
    say(f"{options.out}: a {kind} scene of {count} parameters")
    return 0


COMMAND = Command(Import, run)
