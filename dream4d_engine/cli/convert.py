"""Turn a checkpoint of Stable Diffusion, MVDream or Zero123 into a folder in diffusers' format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from ..priors.formats.convert import convert
from ..priors.formats.weights import human_size
from .command import Command
from .errors import UsageError
from .options import FILE, FOLDER, Machine, MachineOptions, Positional, arg, optional
from .terminal import say


@dataclass(frozen=True)
class Convert:
    checkpoint: Annotated[Positional[Path], arg(metavar="CKPT")]
    """The checkpoint (.safetensors, .ckpt, .pt)."""
    out: Annotated[Path, FOLDER]
    """The folder to write."""
    kind: Annotated[Literal["image", "multiview", "novel_view"] | None, optional("KIND")] = None
    """What it must be: image, multiview or novel_view (default: what it is)."""
    config: Annotated[Path | None, FILE] = None
    """The model's own configuration, .yaml or .json (default: the one of its name beside it, if any)."""
    half: bool = False
    """Write the weights in half precision."""
    overwrite: bool = False
    """Replace the folder if it is there."""
    machine: Machine = MachineOptions()


def run(options: Convert) -> int:
    """Turn a checkpoint into a folder in diffusers' format."""
    if options.out.exists() and not options.overwrite:
        raise UsageError(f"{options.out} exists: choose another --out, or --overwrite")
    done = convert(
        options.checkpoint,
        options.out,
        options.kind,
        config=options.config,
        dtype=torch.float16 if options.half else None,
        overwrite=options.overwrite,
    )
    for note in done.notes:
        say(f"note: {note}")
    say(f"{done.folder}: a model of kind {done.kind} ({', '.join(done.parts)}), {human_size(done.n_bytes)}")
    if not {"text_encoder", "image_encoder"} & set(done.parts):
        say("(the checkpoint has no encoder of prompts or images: the folder can't be told anything)")
    return 0


COMMAND = Command(Convert, run)
