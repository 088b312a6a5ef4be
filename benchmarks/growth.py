"""How the cost of each part grows with rays, samples, frames and resolution: `python benchmarks/growth.py OUT`.

Writes OUT/growth.json and the plot OUT/growth.png: medians of what a stage-1 step renders, the kernels by themselves,
a stage-2 step's rendering, and the guidance by a video model of full size (random weights), each forward and backward.
On a CPU everything is smaller and the video model is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from common import CUDA, DEVICE, milliseconds, moving_scene, static_scene, step_of, takes, views

from dream4d_engine.guidance.distillation import Guidance, distill
from dream4d_engine.priors.architectures import ZEROSCOPE_V2, random_guidance
from dream4d_engine.priors.networks.execution import Runtime
from dream4d_engine.randomness import Draw
from dream4d_engine.rays import rays_from_cameras
from dream4d_engine.rendering.march import points_of, sample_rays
from dream4d_engine.training.config import ZEROSCOPE

Point = tuple[float, float]
"""(how much there is of something, milliseconds)."""


def over_rays() -> dict[str, list[Point]]:
    """A stage-1 step without its models, by the number of rays."""
    scene, sizes = static_scene(), (32, 64, 96, 128, 192, 256, 384) if CUDA else (8, 16, 32, 64, 96)
    points = [(4 * size**2, milliseconds(step_of(scene, views(1, size)))) for size in sizes]
    return {"a stage-1 step's rendering": points}


def over_samples() -> dict[str, list[Point]]:
    """The kernels by themselves, forward and backward, by the number of samples on 4 images' rays."""
    scene, rays = static_scene(), rays_from_cameras(views(1, 256 if CUDA else 48))
    grid = scene.canonical.grid
    found: dict[str, list[Point]] = {"march": [], "hash encoding": [], "composite": []}
    for n_samples in (64, 128, 256, 512, 1024):
        samples = sample_rays(scene, rays, n_samples)
        points, _ = points_of(rays, samples)
        u = ((points / scene.config.radius + 1) / 2).requires_grad_()
        density, values = torch.rand(len(u), device=DEVICE), torch.rand(len(u), 5, device=DEVICE)
        both = (density.requires_grad_(), values.requires_grad_())
        where = (samples.ray_indices, samples.t_starts, samples.t_ends, samples.n_rays)

        def encode(u=u) -> None:
            grid(u, scene.kernels).sum().backward()

        def composite(both=both, where=where) -> None:
            weights, sums = scene.kernels.composite(*both, *where)
            (weights.sum() + sums.sum()).backward()

        def march(n_samples=n_samples) -> None:
            sample_rays(scene, rays, n_samples)

        for name, run in (("march", march), ("hash encoding", encode), ("composite", composite)):
            found[name].append((len(u), milliseconds(run)))
    return found


def over_frames() -> dict[str, list[Point]]:
    """A stage-2 step without its model and the guidance alone, by the number of frames."""
    scene, size = moving_scene(12), (80, 144) if CUDA else (20, 36)
    counts = (8, 16, 24, 32) if CUDA else (2, 4, 8, 16, 24)
    found = {f"rendering {size[1]}x{size[0]}": [(n, milliseconds(step_of(scene, takes(n, *size)))) for n in counts]}
    if CUDA:
        found["guidance, 576x320"] = [(n, guidance_milliseconds(n, (320, 576))) for n in counts]
    return found


def over_resolution() -> dict[str, list[Point]]:
    """The same for 24 frames, by the pixels of one."""
    scene, shapes = (
        moving_scene(12),
        ((40, 72), (80, 144), (120, 216), (160, 288)) if CUDA else ((10, 18), (20, 36), (40, 72)),
    )
    n = ZEROSCOPE.n_frames if CUDA else 4
    found = {f"rendering {n} frames": [(h * w, milliseconds(step_of(scene, takes(n, h, w)))) for h, w in shapes]}
    if CUDA:
        shapes = ((160, 288), (192, 384), (256, 448), (320, 576))
        found["guidance, 24 frames"] = [(h * w, guidance_milliseconds(n, (h, w))) for h, w in shapes]
    return found


@cache
def video_guidance() -> Guidance:
    """With nothing compiled or captured: that would take minutes for all sizes."""
    runtime = Runtime(DEVICE, torch.float16, accelerated=True, compiled=False)
    return random_guidance(ZEROSCOPE_V2, ZEROSCOPE.guidance[0].distillation, runtime)


def guidance_milliseconds(n_frames: int, size: tuple[int, int]) -> float:
    """Encode, denoise, decode and go back."""
    denoiser = replace(video_guidance().denoiser, image_size=size, n_frames=n_frames)
    guidance, cameras = replace(video_guidance(), denoiser=denoiser), takes(n_frames, 80, 144)
    images = torch.rand(1, n_frames, 3, 80, 144, device=DEVICE, requires_grad=True)

    def run() -> None:
        distill(guidance, images, cameras, 0.0, Draw(1)).loss.backward()

    return milliseconds(run, 3)


def plot(path: Path, found: dict[str, dict[str, Iterable[Point]]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as pyplot
    from matplotlib.ticker import NullFormatter

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for axis, (quantity, lines) in zip(axes.flat, found.items(), strict=True):
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xlabel=quantity, ylabel="ms", xscale="log", yscale="log")
        shown = sorted({round(x) for points in lines.values() for x, _ in points})
        axis.set_xticks(shown[:: -(-len(shown) // 6)], labels=[f"{x:,}" for x in shown[:: -(-len(shown) // 6)]])
        for each in (axis.xaxis, axis.yaxis):
            each.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.suptitle(torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads")
    figure.savefig(path, dpi=90)


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    parts = {"rays": over_rays, "samples": over_samples, "frames": over_frames, "pixels of a frame": over_resolution}
    found = {}
    for quantity, measure in parts.items():
        found[quantity] = measure()
        (out / "growth.json").write_text(json.dumps(found, indent=1) + "\n")
        for name, points in found[quantity].items():
            print(f"{quantity}: {name}: " + ", ".join(f"{n:,.0f} {ms:.2f} ms" for n, ms in points), flush=True)
    plot(out / "growth.png", found)


if __name__ == "__main__":
    main()
