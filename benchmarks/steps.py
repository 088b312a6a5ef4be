"""What a training step takes without its diffusion models, and frames a second: `python benchmarks/steps.py`.

Fresh scenes of the published recipes: cameras, rendering, a random gradient on the images, backward pass, optimizer.
On CUDA, with the kernels in use and with parts of them replaced by plain PyTorch, and with the kernels that
take longest. On a CPU the images are a sixteenth as large, and the figures only show that the script works.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from common import (
    CUDA,
    DEVICE,
    SHRINK,
    milliseconds,
    moving_scene,
    recipe_take,
    static_scene,
    step_of,
    views,
)

from dream4d_engine.cameras import CameraBatch, orbit
from dream4d_engine.kernels import Kernels, select_kernels, torch_kernels
from dream4d_engine.profiling import profile
from dream4d_engine.rendering import RenderOptions, render_chunked
from dream4d_engine.scene import Scene


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
