"""How near the meshes of trained toy scenes are to the true surfaces: python benchmarks/surfaces.py RUN... [--out FILE]

A RUN is a folder that `dream4d text-to-4d CAPTION --out RUN` wrote (its name is the caption where the scene has none:
a_red_cube). Lengths are shares of the true object's longest
side. `chamfer` is the mean of both ways between the surface extracted at time 0 and the true one, `moving` the mean
distance of the followed surface from the true moving one over the key times, `aligned` the same after the scale and
shift that fit best; silhouettes are compared with the renderer's opacity > 0.5.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import common  # noqa: F401  this checkout comes first
import torch
from torch import Tensor

from dream4d_engine.assets import load_scene
from dream4d_engine.export.meshes import ExportOptions, scene_mesh
from dream4d_engine.meshes import Material
from dream4d_engine.meshes.look import Surface, look_at
from dream4d_engine.rendering import render_chunked
from dream4d_engine.scene import Scene
from dream4d_engine.surface import extract_surface
from dream4d_engine.surface.silhouettes import silhouette_cameras
from dream4d_engine.toyworld.captions import MOTIONS, SHAPES, Caption, as_caption
from dream4d_engine.toyworld.motions import world_from_canonical
from dream4d_engine.toyworld.shapes import SHAPE_MODELS, Shape, surface_normals

SAMPLES = 20_000


def true_surface(shape: Shape, generator: torch.Generator) -> Tensor:
    """Points [S, 3] on a shape: random ones, moved along the distance's slope until they are on it."""
    points = (torch.rand(2 * SAMPLES, 3, generator=generator) * 2 - 1) * shape.bound
    for _ in range(30):
        points = points - shape.distance(points)[:, None] * surface_normals(shape, points)
    return points[shape.distance(points).abs() < 1e-3]


def on_mesh(vertices: Tensor, faces: Tensor, generator: torch.Generator) -> Tensor:
    """Points [S, 3] spread evenly over a mesh (Osada et al. 2002, equation 1)."""
    a, b, c = vertices[faces].unbind(1)
    area = torch.linalg.cross(b - a, c - a).norm(dim=-1)
    face = torch.multinomial(area, SAMPLES, True, generator=generator)
    u, v = torch.rand(SAMPLES, 2, generator=generator).unbind(-1)
    u = u.sqrt()[:, None]
    return a[face] * (1 - u) + b[face] * (u * (1 - v[:, None])) + c[face] * (u * v[:, None])


def to_truth(points: Tensor, shape: Shape, world: Tensor) -> Tensor:
    """Distances [S] of points from a shape that has been moved by `world` [4, 4]."""
    inverse = torch.linalg.inv(world)
    return shape.distance(points @ inverse[:3, :3].T + inverse[:3, 3]).abs()


def aligned_distance(points: Tensor, shape: Shape, world: Tensor) -> float:
    """The mean of `to_truth` after the scale and shift that make it least."""
    fit = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([fit], 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss = to_truth(points * fit[0].exp() + fit[1:], shape, world).mean()
        loss.backward()
        fit.grad = torch.nan_to_num(fit.grad)  # a distance has no slope at the surface itself
        optimizer.step()
    return float(loss.detach())


def silhouettes(scene: Scene, vertices: Tensor, faces: Tensor, moment: float, size: int, n_views: int) -> float:
    """The mean IoU of a mesh's silhouettes with the scene's."""
    cameras = silhouette_cameras(scene, moment, size, n_views)
    solid = render_chunked(scene, cameras).opacity[0, ..., 0] > 0.5
    none = torch.zeros(len(faces))
    surface = Surface(vertices[faces], None, None, none.long(), (Material(),), ((),), none)
    covered = look_at(surface, cameras, supersample=1).mask[0, ..., 0] > 0.5
    pairs = zip(solid, covered, strict=True)
    return sum(float((a & b).sum() / (a | b).sum().clamp_min(1)) for a, b in pairs) / n_views


def measure(run: Path) -> dict[str, float | str]:
    """Extract, follow, compare."""
    from scipy.spatial import cKDTree

    scene, provenance = load_scene(run / "scene.safetensors")
    prompt = provenance.prompt or run.name.replace("_", " ")
    caption: Caption = as_caption(prompt)
    shape, generator = SHAPE_MODELS[caption.shape], torch.Generator().manual_seed(0)
    began = time.perf_counter()
    made = scene_mesh(scene, ExportOptions())
    seconds, mesh = time.perf_counter() - began, made.mesh
    truth = true_surface(shape, generator)
    side = float((truth.amax(0) - truth.amin(0)).max())
    kinds = torch.tensor([MOTIONS.index(caption.motion)]), torch.tensor([SHAPES.index(caption.shape)])

    own = extract_surface(scene, 0.0).mesh
    points = on_mesh(own.vertices, own.faces, generator)
    rest = world_from_canonical(*kinds, torch.zeros(1))[0]
    back = torch.from_numpy(cKDTree(points.numpy()).query((truth @ rest[:3, :3].T + rest[:3, 3]).numpy())[0])
    found: dict[str, float | str] = {
        "caption": prompt,
        "chamfer": (float(to_truth(points, shape, rest).mean()) + float(back.mean())) / 2 / side,
        "aligned": aligned_distance(points, shape, rest) / side,
        "silhouettes at rest": silhouettes(scene, own.vertices, own.faces, 0.0, 256, 8),
    }
    if made.tracks is not None and mesh.tracks is not None and mesh.times is not None:
        ious, off = [], []
        for vertices, moment in zip(mesh.tracks, mesh.times.tolist(), strict=True):
            ious.append(silhouettes(scene, vertices, mesh.faces, moment, 96, 6))
            world = world_from_canonical(*kinds, torch.tensor([moment]))[0]
            off.append(float(to_truth(on_mesh(vertices, mesh.faces, generator), shape, world).mean()) / side)
        found |= {"moved, mean": sum(ious) / len(ious), "moved, worst moment": min(ious)}
        found |= {"moving": sum(off) / len(off), "unconverged": made.tracks.unconverged}
    return found | {"seconds": seconds}


def main() -> None:
    """Print a table, a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="a .json for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for run in options.runs:
        rows.append(measure(run))
        print(" | ".join(v if isinstance(v, str) else f"{k} {v:.4f}" for k, v in rows[-1].items()), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(rows, indent=1))
    for name in [key for key in rows[0] if key != "caption"]:
        values = [float(row[name]) for row in rows if name in row]
        print(f"{name}: mean {sum(values) / len(values):.4f}, least {min(values):.4f}, most {max(values):.4f}")


if __name__ == "__main__":
    main()
