"""What a training step takes without its diffusion models, and frames a second: `python benchmarks/steps.py`.

Fresh scenes of the published recipes: cameras, rendering, a random gradient on the images, backward pass, optimizer.
On CUDA, with the kernels in use and with parts of them replaced by plain PyTorch, and with the kernels that
take longest. On a CPU the recipes are the toy ones, and every backend that runs there takes its turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from common import (
    CUDA,
    DEVICE,
    generator,
    in_turns,
    milliseconds,
    moving_scene,
    recipe_take,
    static_scene,
    step_of,
    toy_cameras,
    toy_scenes,
    views,
)

from dream4d_engine.cameras import CameraBatch, orbit
from dream4d_engine.kernels import Kernels, kernel_status, select_kernels, torch_kernels
from dream4d_engine.profiling import profile
from dream4d_engine.rendering import RenderOptions, render_chunked
from dream4d_engine.scene import Scene


def report(name: str, scene: Scene, cameras: CameraBatch, kernels: Kernels, profiled: bool = False) -> None:
    scene.kernels = kernels
    step = step_of(scene, cameras)
    n_samples = step()
    print(f"{name:<52}{milliseconds(step):9.2f} ms  {n_samples:>9,} samples", flush=True)
    if profiled:
        print("\n".join(f"    {line}" for line in profile(step, DEVICE).lines()), flush=True)


def frames(scene: Scene, n: int = 12) -> None:
    size = 512
    cameras = orbit(n, size, size, time=torch.linspace(0, 1, n))
    scene.refresh_occupancy()
    for half in (False, True):
        options = RenderOptions(half=half)
        render_chunked(scene, cameras.frames(0, 1), options)
        began = time.perf_counter()
        for index in range(n):
            render_chunked(scene, cameras.frames(index, index + 1), options)
        rate = n / (time.perf_counter() - began)
        print(f"frames of {size}x{size}, {'half' if half else 'full'} precision: {rate:.1f} a second", flush=True)


def on_a_cpu() -> None:
    found = [select_kernels(DEVICE, one.name) for one in kernel_status(DEVICE) if one.usable]
    print(f"{'ms of one thread of a cpu':<52}" + "".join(f"{kernels.name:>10}" for kernels in found))
    (still, moving), (views_of_one, take) = toy_scenes(), toy_cameras()
    frame = orbit(1, 128, 128, time=torch.zeros(1))

    def with_kernels(scene: Scene, work: Callable[[Scene], Callable[[], object]]) -> list[Callable[[], object]]:
        copies = [scene.clone() for _ in found]
        for copy, kernels in zip(copies, found, strict=True):
            copy.kernels = kernels
        return [work(copy) for copy in copies]

    lines: list[tuple[str, Scene, Callable[[Scene], Callable[[], object]]]] = [
        ("stage 1, 4 of 32x32", still, lambda scene: step_of(scene, views_of_one)),
        ("stage 2, 8 of 32x32", moving, lambda scene: step_of(scene, take)),
        ("stage 2, where density may be", moving, lambda scene: lambda: scene.update_occupancy(generator(0), True)),
        ("a frame of 128x128", moving, lambda scene: lambda: render_chunked(scene, frame)),
    ]
    for name, scene, work in lines:
        took = in_turns(with_kernels(scene, work))
        print(f"{name:<52}" + "".join(f"{ms:>10.1f}" for ms in took), flush=True)


def main() -> None:
    if not CUDA:
        return on_a_cpu()
    used = select_kernels(DEVICE)
    print(torch.cuda.get_device_name(), "kernels:", used.name)
    for name, n_groups, size in (("8 of 64x64", 2, 64), ("4 of 256x256", 1, 256)):
        report(f"stage 1, {name}", static_scene(), views(n_groups, size), used, profiled=size == 256)
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
