"""What a training step takes without its diffusion models, and frames a second: `python benchmarks/steps.py`.

Fresh scenes of the published recipes: cameras, rendering, a random gradient on the images, backward pass, optimizer.
On CUDA, with the kernels in use and with parts of them replaced by plain PyTorch, and with the kernels that
take longest. On a CPU the images are a sixteenth as large, and the figures only show that the script works.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dream4d_engine.cameras import CameraBatch, orbit, sample_takes, sample_views
from dream4d_engine.kernels import Kernels, select_kernels, torch_kernels
from dream4d_engine.machine import pick_device
from dream4d_engine.profiling import profile
from dream4d_engine.rendering import RenderOptions, render, render_chunked
from dream4d_engine.scene import Scene, build_scene
from dream4d_engine.supervision import losses
from dream4d_engine.training.config import TEXT_TO_3D, ZEROSCOPE

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


def views(n_groups: int, size: int) -> CameraBatch:
    """Cameras of stage 1."""
    return sample_views(TEXT_TO_3D.cameras, n_groups, 4, size, size, generator(4)).to(DEVICE)


def takes(n_frames: int, height: int, width: int) -> CameraBatch:
    """Cameras of stage 2."""
    return sample_takes(ZEROSCOPE.cameras, 1, n_frames, height, width, generator(3), ZEROSCOPE.time_span).to(DEVICE)


def recipe_take() -> CameraBatch:
    """The take of the recipe zeroscope-144x80; smaller on a CPU."""
    return takes(ZEROSCOPE.n_frames if CUDA else 2, 80 // SHRINK, 144 // SHRINK)


def report(name: str, scene: Scene, cameras: CameraBatch, kernels: Kernels, profiled: bool = False) -> None:
    scene.kernels = kernels
    step = step_of(scene, cameras)
    n_samples = step()
    print(f"{name:<52}{milliseconds(step):9.2f} ms  {n_samples:>9,} samples", flush=True)
    if profiled and CUDA:
        print("\n".join(f"    {line}" for line in profile(step, DEVICE).lines()), flush=True)


def frames(scene: Scene, n: int = 12 if CUDA else 2) -> None:
    size = 512 // SHRINK
    cameras = orbit(n, size, size, time=torch.linspace(0, 1, n))
    if CUDA:
        scene.refresh_occupancy()
    for half in (False, True):
        options = RenderOptions(half=half)
        render_chunked(scene, cameras.frames(0, 1), options)
        began = time.perf_counter()
        for index in range(n):
            render_chunked(scene, cameras.frames(index, index + 1), options)
        rate = n / (time.perf_counter() - began)
        print(f"frames of {size}x{size}, {'half' if half else 'full'} precision: {rate:.1f} a second", flush=True)


def main() -> None:
    used = select_kernels(DEVICE)
    print(torch.cuda.get_device_name() if CUDA else "cpu", "kernels:", used.name)
    for name, n_groups, size in (("8 of 64x64", 2, 64), ("4 of 256x256", 1, 256)):
        report(f"stage 1, {name}", static_scene(), views(n_groups, size // SHRINK), used, profiled=size == 256)
    cameras = recipe_take()
    report("stage 2, 24 of 144x80, 4 levels", moving_scene(4), cameras, used)
    scene = moving_scene(12)
    report("stage 2, 24 of 144x80, 12 levels", scene, cameras, used, profiled=True)
    frames(scene)
    if used.name != "torch":
        report("  the same with PyTorch's networks", scene, cameras, replace(used, mlp=torch_kernels.mlp))
        report("  the same with plain PyTorch", scene, cameras, select_kernels(DEVICE, "torch"))


if __name__ == "__main__":
    main()
