"""The command bench: seconds a step and peak memory of recipes."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from ..machine import check_folder, peak_memory, pick_device, versions, write_atomically
from ..scene import Scene, build_scene
from ..training.config import MOTION_RECIPES, STATIC_RECIPES, MotionRecipe, StaticRecipe, find_recipe
from ..training.guidance import load_guidance
from ..training.loop import RunControl, StepReport
from ..training.motion import train_motion
from ..training.static import train_static
from .arguments import Bench
from .interrupts import stop_on_interrupt
from .models import prior_folders
from .parsing import UsageError
from .progress import make_progress

_STAGES = {"static": STATIC_RECIPES, "motion": MOTION_RECIPES}
_PROMPT = "a red cube is jumping"


@dataclass(frozen=True)
class Measured:
    """`peak_memory_bytes` is the GPU's for this recipe, or the whole process's so far on a CPU."""

    recipe: str
    models: dict[str, str]
    pictures: str
    steps: int
    seconds_per_step: float
    peak_memory_bytes: int | None


def bench(options: Bench) -> int:
    """Measure the recipes and print a table."""
    if options.steps < 1 or options.warmup < 0:
        raise UsageError(f"--steps must be at least 1 and --warmup 0, got {options.steps} and {options.warmup}")
    if options.out is not None:
        if options.out.is_dir():
            raise UsageError(f"{options.out} is a folder: --out names the file for the results")
        check_folder(options.out.parent, 2**16)
    device = pick_device(options.machine.device)
    wished = [f"{s}:{n}" for s, recipes in _STAGES.items() for n in recipes]
    names = wished if options.recipes == ("all",) else list(options.recipes)
    recipes = {name: _find(name) for name in names}
    measured = []
    with stop_on_interrupt() as should_stop, make_progress() as progress:
        for name, recipe in recipes.items():
            measured.append(_measure(name, recipe, options, device, progress, should_stop))
    print("\n".join(table(measured, device)))
    if options.out is not None:
        found = {"device": _device_name(device), "versions": versions(), "recipes": [asdict(m) for m in measured]}
        write_atomically(Path(options.out), (json.dumps(found, indent=2) + "\n").encode())
    return 0


def _find(name: str) -> StaticRecipe | MotionRecipe:
    stage, _, recipe = name.partition(":")
    if stage not in _STAGES or not recipe:
        raise UsageError(f"unknown recipe {name!r}: write STAGE:NAME with a stage of {', '.join(_STAGES)}, or all")
    return find_recipe(recipe, _STAGES[stage])


def _measure(
    name: str, recipe: StaticRecipe | MotionRecipe, options: Bench, device: torch.device, progress, should_stop
) -> Measured:
    folders = prior_folders(recipe, options, toys=True)
    guidance = load_guidance(recipe, folders, _PROMPT, device)
    recipe = _fitting(recipe, guidance, options.warmup + options.steps)
    progress.begin(name, recipe.steps)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    moments: list[float] = []

    def on_step(report: StepReport, _scene: Scene) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        moments.append(time.monotonic())
        progress.update(name, report.step, report.loss, report.remaining)

    control = RunControl(on_step=on_step, should_stop=should_stop)
    began = time.monotonic()
    if isinstance(recipe, StaticRecipe):
        train_static(recipe, guidance, seed=0, device=device, control=control)
    else:
        scene_config = STATIC_RECIPES["toy" if recipe.name == "toy" else "text-to-3d"].scene
        still = build_scene(scene_config, torch.Generator().manual_seed(0)).to(device)
        train_motion(still, recipe, guidance, seed=0, device=device, control=control)
    seconds = [after - before for before, after in zip([began, *moments], moments, strict=False)]
    phase = recipe.phases[0]
    n_pictures = phase.n_groups * (recipe.n_views if isinstance(recipe, StaticRecipe) else recipe.n_frames)
    return Measured(
        recipe=name,
        models={kind: str(folder) for kind, folder in folders.items()},
        pictures=f"{n_pictures} of {phase.width}x{phase.height}",
        steps=options.steps,
        seconds_per_step=median(seconds[options.warmup :]),
        peak_memory_bytes=peak_memory(device),
    )


def _fitting(recipe: StaticRecipe | MotionRecipe, guidance, steps: int) -> StaticRecipe | MotionRecipe:
    """The recipe with so many steps of its first phase, and as many views or frames as its models take."""
    counts = [g.denoiser.n_frames for g in guidance.values() if g.denoiser.n_frames]
    key = "n_views" if isinstance(recipe, StaticRecipe) else "n_frames"
    return replace(
        recipe, steps=steps, phases=(replace(recipe.phases[0], start=0.0),), **({key: counts[0]} if counts else {})
    )


def table(measured: list[Measured], device: torch.device) -> list[str]:
    """The measurements as lines of text."""
    lines = [f"{'recipe':<26}{'pictures':<16}{'seconds a step':>15}{'peak memory':>14}   ({_device_name(device)})"]
    for m in measured:
        peak = "unknown" if m.peak_memory_bytes is None else f"{m.peak_memory_bytes / 2**30:.2f} GiB"
        lines.append(f"{m.recipe:<26}{m.pictures:<16}{m.seconds_per_step:>15.3f}{peak:>14}")
    if device.type != "cuda":
        lines.append("(median over the steps; peak memory is that of the whole process so far)")
    return lines


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
