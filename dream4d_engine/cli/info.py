"""Say what a scene file, a checkpoint or a run's folder holds, or which kernels are in use."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from .. import locks
from ..assets import AssetError, config_from_dict, load_scene, opened, read_info
from ..documents import as_object, read_document, shortened
from ..kernels import kernel_status
from ..machine import pick_device
from ..surface import MotionReadout, measure_motion
from ..training.checkpoint import load_checkpoint
from .command import Command
from .errors import UsageError
from .options import Machine, MachineOptions, Positional, arg
from .progress import Quiet, make_progress, patient
from .run_folder import LOCK, RECORD, read_record, state_of
from .runs import METRICS, SCENE
from .terminal import say, say_json

_OF_A_RUN = ("prompt", "recipe", "seed")
_MOST_LETTERS = 1000  # of a value, shown to people: a mask has thousands


@dataclass(frozen=True)
class Info:
    file: Annotated[Positional[Path | None], arg(metavar="FILE")] = None
    """The file."""
    motion: bool = False
    """How much the scene of a file moves: it is looked at for some seconds."""
    kernels: bool = False
    """Which kernels run on this machine, and why others don't."""
    all: bool = False
    """Everything: the whole configuration, versions, every tensor."""
    json: bool = False
    """As JSON, for programs; everything, too."""
    machine: Machine = MachineOptions()


def run(options: Info) -> int:
    """Say what a file holds, or which kernels are in use."""
    if options.file is None and not options.kernels:
        raise UsageError("name a scene file or a checkpoint, or ask for --kernels")
    found: dict = {} if options.file is None else describe(options.file)
    lines = _lines(found, options.all) if found else []
    if options.motion:
        if options.file is None or not str(found.get("kind")).endswith("scene"):
            raise UsageError(f"--motion is for scene files: name one{_of_a_run(found)}")
        read_out = _measured(options.file, pick_device(options.machine.device), quiet=options.json)
        found["motion"] = read_out.to_dict()
        lines.insert(1, f"motion: {read_out.line}")
    elif found.get("kind") == "moving scene":
        lines.insert(1, "motion: --motion measures it")
    if options.kernels:
        device = pick_device(options.machine.device)
        backends = kernel_status(device)
        used = next(one.name for one in backends if one.usable)  # the fastest stands first
        found["kernels"] = {"device": str(device), "used": used, "backends": [asdict(one) for one in backends]}
        lines.append(f"kernels on {device}: {used}")
        for one in backends:
            state = "in use" if one.name == used else "usable, a faster one is in use"
            lines.append(f"  {one.name:<7} {state if one.usable else 'not usable: ' + one.reason}")
    if options.json:
        say_json({name: _plain(value) for name, value in found.items()})
    else:
        say(*lines)
    return 0


def _of_a_run(found: dict) -> str:
    return f", for example {Path(found['file']) / SCENE}" if str(found.get("kind")).startswith("run") else ""


def _measured(path: Path, device: torch.device, quiet: bool) -> MotionReadout:
    """Look at the scene; a bar, or lines, tell how far that is where it takes longer."""
    scene, _ = load_scene(path, device)
    with Quiet() if quiet else make_progress() as progress:
        return measure_motion(scene, on_progress=patient(progress, "motion"))


def _motion_of_run(folder: Path) -> dict | None:
    """What a run wrote of how much its scene moves, if it did."""
    path = folder / METRICS
    if not path.is_file():
        return None
    found = as_object(read_document(path, AssetError), path, AssetError).get("motion")
    if found is None:
        return None
    try:
        return config_from_dict(MotionReadout, found, "motion").to_dict()
    except ValueError as error:
        raise AssetError(f"{path} can't be understood: {error}; remove it") from error


def describe(path: Path) -> dict:
    """Return what a scene file, a run's checkpoint or a run's folder holds, without reading its numbers."""
    if (path / RECORD).is_file():
        record = read_record(path, way_on="name one of the files beside it instead")
        state = state_of(record, locks.holder(path / LOCK))  # whether a process works on it: run.json may be behind
        known = ("command", "prompt", "seed", "stage", "step", "error", "started", "finished", "seconds", "nonfinite")
        found = {"file": str(path), "kind": f"run, {state}"} | {name: record[name] for name in known if name in record}
        motion = _motion_of_run(path)
        return found if motion is None else found | {"motion": motion}
    if path.is_dir():
        raise AssetError(f"{path} is no run's folder, it has no {RECORD}: name one that has, or a file")
    header, tensors = _safetensors_header(path)
    common = {"file": str(path), "bytes": path.stat().st_size}
    if header.get("format", "").endswith("checkpoint"):
        saved = load_checkpoint(path)
        what = {"kind": "checkpoint of an unfinished run", "step": saved.step, "identity": saved.identity}
        return common | what | {"tensors": tensors}
    asset = read_info(path)  # raises for what is no scene
    what = {
        "kind": "still scene" if asset.config.deformation is None else "moving scene",
        "format_version": asset.format_version,
        "provenance": asset.provenance,
        "config": asset.config,
    }
    return common | what | {"tensors": tensors}


def _safetensors_header(path: Path) -> tuple[dict[str, str], dict[str, dict]]:
    """Return a safetensors file's metadata and its tensors' types, shapes and bytes."""
    with opened(path) as file:  # checks that the file is whole
        metadata = file.metadata() or {}
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))  # a safetensors file: 8 bytes, so much JSON, the numbers
            entries = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise AssetError(f"{path} is not a readable .safetensors file ({error}): is it complete?") from error
    tensors = {
        name: {"dtype": e["dtype"], "shape": e["shape"], "bytes": e["data_offsets"][1] - e["data_offsets"][0]}
        for name, e in sorted(entries.items())
        if name != "__metadata__"
    }
    return metadata, tensors


def _lines(found: dict, everything: bool) -> list[str]:
    """The description as text, or `everything` that is known."""
    if "tensors" not in found:
        told = {name: value for name, value in found.items() if name not in ("file", "kind") and value is not None}
        if "motion" in told:
            told["motion"] = MotionReadout(**told["motion"]).line
        return [f"{found['file']}: {found['kind']}", *_all_lines(told)]
    first = f"{found['file']}: {_kind(found)}, {found['bytes'] / 2**20:.2f} MiB"
    return [first, *(_everything(found) if everything else _in_short(found))]


def _in_short(found: dict) -> list[str]:
    """Where a scene comes from, or what a checkpoint is of, and how large it is."""
    if "provenance" in found:
        lines = [shortened(line, _MOST_LETTERS) for line in found["provenance"].lines]
    else:
        told = {"step": found["step"]} | found["identity"]
        options = told.get("options")  # of a command; a node's runs have none
        if isinstance(options, dict):
            told |= {name: options.get(name) for name in _OF_A_RUN}
        lines = _all_lines({name: value for name, value in told.items() if isinstance(value, str | int | float)})
    tensors = found["tensors"].values()
    n_numbers = sum(math.prod(tensor["shape"]) for tensor in tensors)
    return [*lines, f"{len(tensors)} tensors, {n_numbers:,} numbers: --all names them, and every setting"]


def _everything(found: dict) -> list[str]:
    """All settings, and all tensors."""
    names, tensors = ("format_version", "step", "provenance", "config", "identity"), found["tensors"]
    lines = _all_lines({name: _plain(found[name]) for name in names if name in found})
    lines.append(f"{len(tensors)} tensors:")
    width = max(map(len, tensors), default=0)
    for name, t in tensors.items():
        shape = "x".join(map(str, t["shape"])) or "scalar"
        lines.append(f"  {name:<{width}}  {t['dtype']:<5} {shape:<12} {t['bytes']:>12,} bytes")
    return lines


def _kind(found: dict) -> str:
    """What it is; a motion with its zoom, as Scene Info says it."""
    motion = None if "config" not in found else found["config"].deformation
    return found["kind"] if motion is None else f"{found['kind']}, zoom {motion.scale:.2f}"


def _plain(value: Any) -> Any:
    """A record as a dictionary."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _all_lines(told: dict) -> list[str]:
    return [line for name, value in told.items() for line in _tree_lines(name, value)]


def _tree_lines(name: str, value: object, depth: int = 0) -> list[str]:
    pad = "  " * depth
    if isinstance(value, dict) and value:
        return [f"{pad}{name}:", *(line for key, part in value.items() for line in _tree_lines(key, part, depth + 1))]
    return [f"{pad}{name}: {shortened(str(value), _MOST_LETTERS)}"]


COMMAND = Command(Info, run)
