"""What a surface looks like: the field's colours, at vertices or baked into a texture."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from ..mesh import Mesh, MeshError, rasterize
from ..scene import Scene
from .libraries import library
from .look import Progress, in_pieces, looks_at

_N_DEPTHS = 12  # places along the normal that a colour is composed of
_OUTSIDE, _INSIDE = 6.0, 4.0  # how far they reach, in cells of the lattice: the haze before a surface counts
_GUTTER = 4  # texels around each chart, so that filtering at its border finds its colour


def surface_colors(scene: Scene, time: float | None, points: Tensor, normals: Tensor, cell: float) -> Tensor:
    """Return what is seen of points [S, 3] of the surface from straight above them: [S, 3] in [0, 1].

    Composed along the normal from just outside to inside, as the renderer does along a ray: the colour of the very
    surface is where the field is least sure of it.
    """
    step = (_OUTSIDE + _INSIDE) * cell / (_N_DEPTHS - 1)
    depths = torch.arange(_N_DEPTHS, device=points.device) * step - _OUTSIDE * cell
    places = points[:, None] - depths[:, None] * normals[:, None]
    found = in_pieces(looks_at(scene, time), places.reshape(-1, 3)).view(len(points), _N_DEPTHS, 4)
    alpha = -torch.expm1(-found[..., 0] * step)
    alpha[:, -1] = 1 - 1e-6  # the last one takes what is left
    passed = torch.cumprod(torch.cat((torch.ones_like(alpha[:, :1]), 1 - alpha[:, :-1]), 1), 1)
    weights = (alpha * passed)[..., None]
    return ((weights * found[..., 1:]).sum(1) / weights.sum(1)).clamp(0, 1)


def bake_texture(
    scene: Scene, time: float | None, mesh: Mesh, size: int = 1024, on_progress: Progress = None
) -> tuple[Mesh, Tensor]:
    """Return the mesh (still, in the frame of `time`) cut into charts, with uv and a texture instead of colours.

    Vertices on the cuts are there several times, with the same place and normal: the second value [V] says which of
    the given vertices each is.
    """
    origin, faces, uv = library("xatlas").parametrize(
        mesh.vertices.cpu().numpy(), mesh.faces.cpu().numpy().astype("uint32")
    )
    origin = torch.from_numpy(origin.astype("int64")).to(mesh.faces)
    faces, uv = torch.from_numpy(faces.astype("int64")).to(mesh.faces), torch.from_numpy(uv).to(mesh.vertices)
    if mesh.normals is None:
        raise MeshError("a texture is baked along normals: the mesh has none")
    vertices, normals = mesh.vertices[origin], mesh.normals[origin]
    raster = rasterize(functional.pad(uv * size, (0, 1)), faces, size, size)
    covered = raster.face >= 0
    corners, weights = faces[raster.face[covered]], raster.barycentric[covered][..., None]
    points = (vertices[corners] * weights).sum(1)
    outward = functional.normalize((normals[corners] * weights).sum(1), dim=-1)
    texels, cell = [], mesh.size / 128
    pieces = list(zip(points.split(2**15), outward.split(2**15), strict=True))
    for number, (place, normal) in enumerate(pieces, 1):
        texels.append(surface_colors(scene, time, place, normal, cell))
        if on_progress is not None:
            on_progress(number / len(pieces))
    texture = torch.zeros(size, size, 3, device=vertices.device)
    texture[covered] = torch.cat(texels)
    texture = _grown(texture, covered)
    return replace(mesh, vertices=vertices, faces=faces, normals=normals, colors=None, uv=uv, texture=texture), origin


def _grown(texture: Tensor, covered: Tensor) -> Tensor:
    """Let the colours of the charts run over their borders, and fill the rest with their mean."""
    color, known = texture.permute(2, 0, 1)[None], covered[None, None].float()
    for _ in range(_GUTTER):
        total, count = (functional.avg_pool2d(x, 3, 1, 1, divisor_override=1) for x in (color * known, known))
        color = torch.where(known > 0, color, total / count.clamp_min(1))
        known = (count > 0).float()
    mean = texture[covered].mean(0)
    return torch.where(known > 0, color, mean[:, None, None])[0].permute(1, 2, 0)
