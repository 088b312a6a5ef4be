"""The kernels by themselves, every backend that loads in the same run: `python benchmarks/kernels.py`.

Hash encoding, forward and backward, on the samples of the recipes' fresh scenes (4 images of 256x256; a take of 24 of
144x80), and marching + compositing of the same rays. For `cuda`, marching is nerfacc's traverse_grids. Medians in ms.
On a CPU the recipes are those for one (toy, mesh-quick), and the time is that of one thread, the backends in turns.
"""

from __future__ import annotations

from collections.abc import Callable

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
    toy_cameras,
    toy_scenes,
    views,
)
from torch import Tensor

from dream4d_engine.cameras import CameraBatch, sample_views
from dream4d_engine.fields.encodings import HashGrid
from dream4d_engine.kernels import Kernels, select_kernels
from dream4d_engine.rays import RayBundle, rays_from_cameras
from dream4d_engine.rendering.march import points_of, sample_rays
from dream4d_engine.scene import Scene, build_scene
from dream4d_engine.training.config import MESH_QUICK, TOY_STATIC

Part = tuple[str, Callable[[Kernels], Callable[[], object]]]


def backends() -> list[Kernels]:
    found = []
    for name in ("triton", "nvrtc", "cuda", "numba", "torch"):
        try:
            found.append(select_kernels(DEVICE, name))
        except ValueError as reason:
            print(reason)
    return found


def cells(scene: Scene, cameras: CameraBatch) -> tuple[RayBundle, Tensor]:
    """The rays, and where their samples lie in the unit box, with their time [S, 4]."""
    rays = rays_from_cameras(cameras)
    points, times = points_of(rays, sample_rays(scene, rays))
    return rays, torch.cat(((points / scene.config.radius + 1) / 2, times[:, None]), -1)


def encoding(grid: HashGrid, x: Tensor, backward: str) -> Callable[[Kernels], Callable[[], object]]:
    """`backward`: "" for none, "table", or "points"."""
    table = grid.table.detach().clone().requires_grad_(backward == "table")
    x = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(backward == "points")
    pull = torch.randn(len(x), grid.layout.n_outputs, generator=generator(5)).to(DEVICE)

    def of(kernels: Kernels) -> Callable[[], object]:
        def run() -> None:
            out = kernels.hash_encode(x, table, grid.layout)
            if backward:
                torch.autograd.grad(out, table if backward == "table" else x, pull)

        return run

    return of


def marching(scene: Scene, rays: RayBundle) -> Callable[[Kernels], Callable[[], object]]:
    """March, weigh 5 columns of values by a density, and go back."""
    config = scene.config
    box = torch.tensor([[-config.radius] * 3 + [config.radius] * 3], device=DEVICE)

    def of(kernels: Kernels) -> Callable[[], object]:
        def march() -> tuple[Tensor, Tensor, Tensor]:
            if kernels.name != "cuda":
                given = (rays.origins, rays.directions, config.radius, config.step_size(None))
                return kernels.march_rays(*given, scene.occupancy.occupied, None)
            import nerfacc

            grid = scene.occupancy.occupied[None]
            intervals, samples, _ = nerfacc.grid.traverse_grids(
                rays.origins, rays.directions, grid, box, step_size=config.step_size(None)
            )
            return samples.ray_indices, intervals.vals[intervals.is_left], intervals.vals[intervals.is_right]

        n = len(march()[0])
        density = torch.rand(n, generator=generator(6)).to(DEVICE).requires_grad_()
        values = torch.rand(n, 5, generator=generator(7)).to(DEVICE).requires_grad_()

        def run() -> None:
            weights, sums = kernels.composite(density, values, *march(), len(rays.origins))
            (weights.sum() + sums.sum()).backward()

        return run

    return of


def gpu_parts() -> list[Part]:
    still, moving = static_scene(), moving_scene(12)
    rays, x = cells(still, views(1, 256))
    _, y = cells(moving, recipe_take())
    grid, deformation = still.canonical.grid, moving.deformation.grid
    print(f"{len(x):,} samples on {len(rays.origins):,} rays; {len(y):,} in the take")
    return [
        ("3D encoding, forward", encoding(grid, x[:, :3], "")),
        ("3D encoding, with the table's gradient", encoding(grid, x[:, :3], "table")),
        ("3D encoding, with the points' gradient", encoding(grid, x[:, :3], "points")),
        ("4D encoding, forward", encoding(deformation, y, "")),
        ("4D encoding, with the table's gradient", encoding(deformation, y, "table")),
        ("4D encoding, with the points' gradient", encoding(deformation, y, "points")),
        ("marching + compositing, forward, backward", marching(still, rays)),
    ]


def cpu_parts() -> list[Part]:
    """A toy step of each stage; of mesh-quick the points of a step and as many rays, seen by the toy's cameras."""
    (still, moving), (views_of_one, take) = toy_scenes(), toy_cameras()
    mesh, last, size = build_scene(MESH_QUICK.scene, generator(0)), MESH_QUICK.phases[-1], views_of_one.height
    mesh.update_occupancy(generator(0), all_cells=True)
    rays, x = cells(still, views_of_one)
    _, y = cells(moving, take)
    _, z = cells(mesh, sample_views(TOY_STATIC.cameras, 1, last.n_rays // size**2, size, size, generator(4)))
    z = torch.cat((z[:, :3], torch.rand(last.n_points, 3, generator=generator(8))))
    print(f"{len(x):,} samples on {len(rays.origins):,} rays; {len(y):,} in the take; {len(z):,} of mesh-quick")
    found: list[Part] = []
    for name, grid, points in (
        ("toy, 3D", still.canonical.grid, x[:, :3]),
        ("toy, 4D", moving.deformation.grid, y),
        ("mesh-quick, 3D", mesh.canonical.grid, z),
    ):
        found.append((f"{name}: encoding, forward", encoding(grid, points, "")))
        found.append((f"{name}: with the table's gradient", encoding(grid, points, "table")))
        found.append((f"{name}: with the points' gradient", encoding(grid, points, "points")))
    return [*found, ("toy: marching + compositing, there and back", marching(still, rays))]


def main() -> None:
    kernels = backends()
    print(
        f"{'ms on ' + (torch.cuda.get_device_name() if CUDA else 'cpu'):<44}"
        + "".join(f"{k.name:>10}" for k in kernels)
    )
    for name, of in gpu_parts() if CUDA else cpu_parts():
        runs = [of(k) for k in kernels]
        found = [milliseconds(run) for run in runs] if CUDA else in_turns(runs)
        print(f"{name:<44}" + "".join(f"{took:>10.2f}" for took in found), flush=True)


if __name__ == "__main__":
    main()
