"""The commands about files: render, import, info."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .. import locks
from ..assets import AssetError, load_scene, opened, read_info, save_scene
from ..cameras import CameraBatch, final_path, fixed_take, orbit
from ..dream_in_4d import import_checkpoint
from ..export import VideoWriter, save_image
from ..kernels import kernel_status
from ..machine import check_folder, check_memory, pick_device, versions
from ..training.checkpoint import load_checkpoint
from ..training.estimate import film_bytes
from ..training.loop import Interrupted
from . import results
from .arguments import Import, Info, Render
from .interrupts import stop_on_interrupt
from .parsing import RECORD, UsageError, read_record
from .progress import make_progress
from .run_folder import LOCK, state_of
from .terminal import say, say_json


def render(options: Render) -> int:
    """Make videos and images of a scene file."""
    width, height = options.size
    passes = tuple(dict.fromkeys(options.passes))
    if not passes or not (options.video or options.png):
        raise UsageError("nothing to render: give --passes, and leave --no-video away or add --png")
    scene, provenance = load_scene(options.scene, pick_device(options.machine.device))
    render_options = results.options_for(passes, options.samples, scene.deformation is not None)
    cameras = _cameras(options, height, width)
    n_frames = cameras.shape[1]
    check_memory(film_bytes(height, width), f"a frame of {width}x{height}", "lower --size")
    out = options.out or options.scene.parent / "renders"
    videos = {name: out / f"{options.path}_{name}.mp4" for name in passes if options.video}
    folders = {name: out / f"{options.path}_{name}" for name in passes if options.png}
    _require_new([*videos.values(), *folders.values()], options.overwrite, folders=list(folders.values()))
    check_folder(out, n_frames * len(passes) * height * width * 4)
    span = results.measure_range(scene, cameras, render_options)
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
            _remove_later(folder, n_frames)
    say(f"{out}: {', '.join(path.name for path in [*videos.values(), *folders.values()])}")
    return 0


def _cameras(options: Render, height: int, width: int) -> CameraBatch:
    place = (options.elevation_deg, options.distance, options.fov_y_deg)
    if options.path == "fixed":
        return fixed_take(options.frames, height, width, options.azimuth_deg, *place)
    if options.path == "final":
        return final_path(height, width, results.FINAL_PARTS, options.frames, *place)
    time = torch.linspace(0, 1, options.frames)[None] if options.animate else options.time
    return orbit(options.frames, height, width, *place, time=time, start_deg=options.azimuth_deg)


def _remove_later(folder: Path, n_frames: int) -> None:
    """Remove the frames that a longer film left behind the `n_frames` of this one."""
    for path in folder.glob("[0-9]*.png"):
        if path.stem.isdecimal() and int(path.stem) >= n_frames:
            path.unlink()


def _require_new(paths: Sequence[Path], overwrite: bool, folders: Sequence[Path] = ()) -> None:
    """Refuse paths that are taken, even with `overwrite` by what is no file, or no folder for those of `folders`."""
    present = [path for path in paths if path.exists()]
    for path in present:
        if path.is_dir() != (path in folders):
            kinds = ("file", "folder") if path in folders else ("folder", "file")
            raise UsageError(f"{path} is a {kinds[0]} where a {kinds[1]} belongs: choose another --out")
    if present and not overwrite:
        raise UsageError(f"{present[0]} exists: choose another --out, or --overwrite")


def import_file(options: Import) -> int:
    """Turn a checkpoint of the original into a scene file."""
    _require_new([options.out], options.overwrite)
    scene, provenance = import_checkpoint(options.checkpoint)
    check_folder(options.out.parent, options.checkpoint.stat().st_size)
    save_scene(options.out, scene, replace(provenance, versions=versions()))
    kind = "still" if scene.deformation is None else "moving"
    say(f"{options.out}: a {kind} scene of {_count(sum(p.numel() for p in scene.parameters()))} parameters")
    return 0


# ---- info --------------------------------------------------------------------------------------------------------


def info(options: Info) -> int:
    """Say what a file holds, or which kernels are in use."""
    if options.file is None and not options.kernels:
        raise UsageError("name a scene file or a checkpoint, or ask for --kernels")
    found: dict = {} if options.file is None else describe(options.file)
    lines = _lines(found) if found else []
    if options.kernels:
        found["kernels"] = describe_kernels(pick_device(options.machine.device))
        lines += _kernel_lines(found["kernels"])
    if options.json:
        say_json(found)
    else:
        say(*lines)
    return 0


def describe_kernels(device: torch.device) -> dict:
    """Return which kernels are used on a device, and for each backend whether it could be and why not."""
    found = kernel_status(device)
    used = next(status.name for status in found if status.usable)
    return {"device": str(device), "used": used, "backends": [asdict(status) for status in found]}


def _kernel_lines(found: dict) -> list[str]:
    lines = [f"kernels on {found['device']}: {found['used']}"]
    for status in found["backends"]:
        state = "in use" if status["name"] == found["used"] else "usable, a faster one is in use"
        lines.append(f"  {status['name']:<7} {state if status['usable'] else 'not usable: ' + status['reason']}")
    return lines


def describe(path: Path) -> dict:
    """Return what a scene file, a run's checkpoint or a run's folder holds, without reading its numbers."""
    if (path / RECORD).is_file():
        return _describe_run(path)
    if not path.is_file():
        raise AssetError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
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
        "provenance": asdict(asset.provenance),
        "config": asdict(asset.config),
    }
    return common | what | {"tensors": tensors}


def _describe_run(folder: Path) -> dict:
    """Return what a run's record says, and whether a process works on it."""
    record = read_record(folder)
    state = state_of(record, locks.holder(folder / LOCK))
    known = ("command", "prompt", "seed", "stage", "step", "error", "started", "finished", "seconds", "nonfinite")
    return {"file": str(folder), "kind": f"run, {state}"} | {name: record[name] for name in known if name in record}


def _safetensors_header(path: Path) -> tuple[dict[str, str], dict[str, dict]]:
    """Return a safetensors file's metadata and its tensors' types, shapes and bytes."""
    with opened(path) as file:  # checks that the file is whole
        metadata = file.metadata() or {}
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise AssetError(f"{path} is not a readable .safetensors file ({error})") from error
    tensors = {
        name: {"dtype": e["dtype"], "shape": e["shape"], "bytes": e["data_offsets"][1] - e["data_offsets"][0]}
        for name, e in sorted(entries.items())
        if name != "__metadata__"
    }
    return metadata, tensors


def _lines(found: dict) -> list[str]:
    """The description as text."""
    if "tensors" not in found:
        return [f"{found['file']}: {found['kind']}"] + [
            line for name in list(found)[2:] for line in _tree_lines(name, found[name])
        ]
    tensors = found["tensors"]
    lines = [f"{found['file']}: {found['kind']}, {found['bytes'] / 2**20:.2f} MiB"]
    for name in ("format_version", "step", "provenance", "config", "identity"):
        if name in found:
            lines += _tree_lines(name, found[name])
    lines.append(f"{len(tensors)} tensors:")
    width = max(map(len, tensors), default=0)
    for name, t in tensors.items():
        shape = "x".join(map(str, t["shape"])) or "scalar"
        lines.append(f"  {name:<{width}}  {t['dtype']:<5} {shape:<12} {t['bytes']:>12,} bytes")
    return lines


def _tree_lines(name: str, value: object, depth: int = 0) -> list[str]:
    pad = "  " * depth
    if isinstance(value, dict) and value:
        return [f"{pad}{name}:", *(line for key, part in value.items() for line in _tree_lines(key, part, depth + 1))]
    return [f"{pad}{name}: {value}"]


def _count(number: int) -> str:
    if number < 1000:
        return str(number)
    power = min(int(math.log10(number)) // 3, 3)
    return f"{number / 1000**power:.1f} {['', 'thousand', 'million', 'billion'][power]}"
