"""What the benchmarks share: the recipes' fresh scenes and cameras, a training step without its models, and a clock."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

# A benchmark measures the checkout that it lies in, whichever is installed; tests/ has what previews.py borrows.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dream4d_engine.cameras import CameraBatch, sample_takes, sample_views
from dream4d_engine.machine import pick_device
from dream4d_engine.rendering import RenderOptions, render
from dream4d_engine.scene import Scene, build_scene
from dream4d_engine.supervision import losses
from dream4d_engine.training.config import TEXT_TO_3D, TOY_MOTION, TOY_STATIC, ZEROSCOPE

DEVICE = pick_device()
CUDA = DEVICE.type == "cuda"
SHRINK = 1 if CUDA else 16


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def static_scene() -> Scene:
    scene = build_scene(TEXT_TO_3D.scene, generator(0)).to(DEVICE)
    scene.update_occupancy(generator(0), all_cells=True)
    return scene


def moving_scene(levels: int) -> Scene:
    """With some motion, so that every gradient is one; the canonical field is frozen, as in training."""
    scene = build_scene(TEXT_TO_3D.scene, generator(0))
    scene = scene.with_deformation(ZEROSCOPE.deformation, generator(1), ZEROSCOPE.fresh_background)
    with torch.no_grad():
        scene.deformation.mlp.layers[-1].normal_(0, 0.02, generator=generator(2))
        scene.deformation.grid.table.normal_(0, 0.05, generator=generator(3))
    scene.deformation.set_active_levels(levels)
    scene.canonical.requires_grad_(False)
    scene = scene.to(DEVICE)
    scene.update_occupancy(generator(0), all_cells=True)
    return scene


def step_of(scene: Scene, cameras: CameraBatch) -> Callable[[], int]:
    """A step that returns the number of samples with a gradient."""
    moving = scene.deformation is not None
    parameters = [p for p in scene.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.99), eps=1e-15, fused=CUDA or None)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=CUDA, init_scale=1024.0)
    options, draws = RenderOptions(stratified=True, displacement=moving), generator(7)
    pull = 1e-2 * torch.randn(*cameras.shape, cameras.height, cameras.width, 3, generator=generator(5)).to(DEVICE)

    def step() -> int:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.float16, enabled=CUDA):
            output = render(scene, cameras, options, draws)
            loss = (output.rgb * pull).sum()
            if moving:
                loss = loss + 1000 * losses.displacement_tv(output.displacement)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return len(output.weights)

    return step


def milliseconds(run: Callable[[], object], repeats: int = 10 if CUDA else 3) -> float:
    """Median over the repeats, after some runs that don't count."""
    for _ in range(3 if CUDA else 1):
        run()
    found = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        run()
        wait()
        found.append(1e3 * (time.perf_counter() - began))
    return median(found)


def in_turns(runs: Sequence[Callable[[], object]], repeats: int = 11) -> list[float]:
    """Medians of what each takes of the processor, on one thread, in ms: other programs may be running."""
    torch.set_num_threads(1)
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, times in zip(runs, found, strict=True):
            began = time.process_time()
            run()
            times.append(1e3 * (time.process_time() - began))
    return [median(times[1:]) for times in found]  # the first time, some compile


def toy_scenes() -> tuple[Scene, Scene]:
    """Fresh scenes of both stages; the second moves a little, so that every gradient is one."""
    still = build_scene(TOY_STATIC.scene, generator(0))
    still.update_occupancy(generator(0), all_cells=True)
    moving = still.with_deformation(TOY_MOTION.deformation, generator(1))
    with torch.no_grad():
        moving.deformation.mlp.layers[-1].normal_(0, 0.02, generator=generator(2))
        moving.deformation.grid.table.normal_(0, 0.05, generator=generator(3))
    moving.canonical.requires_grad_(False)
    moving.update_occupancy(generator(0), all_cells=True)
    return still, moving


def toy_cameras() -> tuple[CameraBatch, CameraBatch]:
    """What a step of either stage is seen by."""
    size, groups = TOY_STATIC.phases[0].height, TOY_STATIC.phases[0].n_groups
    still = sample_views(TOY_STATIC.cameras, groups, TOY_STATIC.n_views, size, size, generator(4))
    span = TOY_MOTION.time_span
    return still, sample_takes(TOY_MOTION.cameras, groups, TOY_MOTION.n_frames, size, size, generator(3), span)


def views(n_groups: int, size: int) -> CameraBatch:
    """Cameras of stage 1."""
    return sample_views(TEXT_TO_3D.cameras, n_groups, 4, size, size, generator(4)).to(DEVICE)


def takes(n_frames: int, height: int, width: int) -> CameraBatch:
    """Cameras of stage 2."""
    return sample_takes(ZEROSCOPE.cameras, 1, n_frames, height, width, generator(3), ZEROSCOPE.time_span).to(DEVICE)


def recipe_take() -> CameraBatch:
    """The take of the recipe zeroscope-144x80; smaller on a CPU."""
    return takes(ZEROSCOPE.n_frames if CUDA else 2, 80 // SHRINK, 144 // SHRINK)
