"""Triangle meshes: the record, and what can be said of one without a scene.

Vertices are in the world's frame (z up, the front towards +x, see `cameras`); faces run counter-clockwise seen from
outside. One topology holds for all moments: what moves are the vertices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


class MeshError(ValueError):
    """There is no mesh to be had, or not one that can be used; the message says why in one line."""


@dataclass(frozen=True)
class Mesh:
    """A mesh, and where its vertices are over time if it moves."""

    vertices: Tensor
    """[V, 3], where they are at the first moment if there are `tracks`."""
    faces: Tensor
    """[M, 3] int64, places in `vertices`."""
    normals: Tensor | None = None
    """[V, 3] unit length, outward."""
    colors: Tensor | None = None
    """[V, 3] in [0, 1], as a screen shows them (sRGB)."""
    uv: Tensor | None = None
    """[V, 2] in [0, 1], from the texture's upper left corner to the right and down, as glTF has it."""
    texture: Tensor | None = None
    """[H, W, 3] in [0, 1], sRGB."""
    tracks: Tensor | None = None
    """[T, V, 3], the vertices at each of `times`."""
    times: Tensor | None = None
    """[T] ascending moments in [0, 1]."""

    def __post_init__(self) -> None:
        n = len(self.vertices)
        shapes: dict[str, tuple[int, ...]] = {"vertices": (n, 3), "faces": (len(self.faces), 3), "normals": (n, 3)}
        shapes |= {"colors": (n, 3), "uv": (n, 2)}
        if self.tracks is not None:
            shapes |= {"tracks": (len(self.tracks), n, 3), "times": (len(self.tracks),)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is None and name != "times":
                continue
            if value is None or tuple(value.shape) != shape:
                raise MeshError(f"a mesh's {name} must have the shape {list(shape)}, got {_shape(value)}")
            if value.is_floating_point() and not value.isfinite().all():
                raise MeshError(f"a mesh's {name} must be finite numbers, some are not")
        if len(self.faces) and not (0 <= int(self.faces.min()) and int(self.faces.max()) < n):
            raise MeshError(f"a mesh's faces must name vertices 0 to {n - 1}, some name others")
        if self.texture is not None and (self.uv is None or self.texture.ndim != 3 or self.texture.shape[-1] != 3):
            raise MeshError(f"a mesh's texture must be [H, W, 3] and needs uv, got {_shape(self.texture)}")

    @property
    def size(self) -> float:
        """The longest side of the box around its faces, at the first moment: vertices that none names don't count."""
        used = self.vertices[self.faces.unique()] if len(self.faces) else self.vertices
        return float((used.amax(0) - used.amin(0)).max())

    def at(self, index: int) -> Mesh:
        """The mesh at one of its moments, as a still one."""
        if self.tracks is None:
            return self
        vertices = self.tracks[index]
        normals = None if self.normals is None else vertex_normals(vertices, self.faces)
        return replace(self, vertices=vertices, normals=normals, tracks=None, times=None)


def _shape(value: Tensor | None) -> object:
    return None if value is None else list(value.shape)


def face_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Return [..., M, 3] outward normals of length twice the face's area, from vertices [..., V, 3]."""
    a, b, c = (vertices[..., faces[:, k], :] for k in range(3))
    return torch.linalg.cross(b - a, c - a)


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Return unit normals [..., V, 3]: those of the faces around, weighted by area.

    Vertices that start at the same place (copies on the cuts of a texture) count as one, so no cut shows.
    """
    first = vertices.reshape(-1, *vertices.shape[-2:])[0]
    _, group = torch.unique(first, dim=0, return_inverse=True)
    around = face_normals(vertices, faces)
    total = torch.zeros_like(vertices)
    for k in range(3):
        total.index_add_(-2, group[faces[:, k]], around)
    total = total[..., group, :]
    length = total.norm(dim=-1, keepdim=True)
    up = total.new_tensor([0.0, 0.0, 1.0])  # a vertex of no area has to point somewhere
    return torch.where(length > 1e-12, total / length.clamp_min(1e-12), up)


def edges_of(faces: Tensor) -> Tensor:
    """Return the undirected edges [E, 2] of faces [M, 3], each once, the lower vertex first."""
    sides = torch.cat((faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]))
    return torch.unique(sides.sort(-1).values, dim=0)


def smoothed(vertices: Tensor, faces: Tensor, rounds: int) -> Tensor:
    """Smooth what vertices have (places, or the ways they went) [V, 3] without shrinking it.

    Each round is a step towards the neighbours' mean and one back (Taubin 1995).
    """
    a, b = edges_of(faces).unbind(-1)
    n = torch.zeros(len(vertices), 1, device=vertices.device)
    for end in (a, b):
        n.index_add_(0, end, torch.ones(len(end), 1, device=vertices.device))
    for _ in range(rounds):
        for step in (0.5, -0.53):  # lambda and mu: frequencies below 1/lambda + 1/mu = 0.11 pass
            total = torch.zeros_like(vertices).index_add_(0, a, vertices[b]).index_add_(0, b, vertices[a])
            vertices = vertices + step * (total / n.clamp_min(1) - vertices)
    return vertices


def without_unused(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Drop faces that name a vertex twice, then vertices that no face names."""
    a, b, c = faces.unbind(-1)
    faces = faces[(a != b) & (b != c) & (c != a)]
    used, renumbered = torch.unique(faces, return_inverse=True)
    return vertices[used], renumbered.reshape(-1, 3)


@dataclass(frozen=True)
class Raster:
    """Which face each pixel of an image shows."""

    face: Tensor
    """[H, W] int64, -1 where there is none."""
    barycentric: Tensor
    """[H, W, 3], of the pixel's middle in its face, in the image's plane."""


def rasterize(
    corners: Tensor, faces: Tensor, height: int, width: int, shows: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Raster:
    """Draw faces over vertices at `corners` [V, 3]: x to the right and y down in pixels, and depth (the nearest wins).

    A pixel shows a face where its middle lies in it. Faces of either orientation are drawn. `shows`: asked with faces
    [S] and places in them [S, 3] which of these are there [S]; where a face has holes, what lies behind is seen.
    """
    device, n_pixels = corners.device, height * width
    nearest = torch.full((n_pixels,), torch.inf, device=device)
    shown = torch.full((n_pixels,), -1, dtype=torch.int64, device=device)
    weights = torch.zeros(n_pixels, 3, device=device)
    triangles = corners[faces]
    low = (triangles[..., :2].amin(1) - 0.5).ceil().long().clamp_min(0)
    high = torch.minimum((triangles[..., :2].amax(1) - 0.5).floor().long(), low.new_tensor([width - 1, height - 1]))
    sides = (high - low + 1).clamp_min(0)
    area = sides.prod(-1)
    ends = area.cumsum(0)
    start = 0
    while start < len(faces):  # pieces of at most some million candidates (or one face)
        base = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(ends, base + 2**22, right=True)))
        piece = torch.arange(start, stop, device=device).repeat_interleave(area[start:stop])
        place = torch.arange(len(piece), device=device) - (ends[piece] - area[piece] - base)
        x, y = low[piece, 0] + place % sides[piece, 0], low[piece, 1] + place // sides[piece, 0]
        start = stop
        a, b, c = triangles[piece].unbind(1)
        px, py = x + 0.5, y + 0.5
        whole = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1])
        wb = ((px - a[:, 0]) * (c[:, 1] - a[:, 1]) - (c[:, 0] - a[:, 0]) * (py - a[:, 1])) / whole
        wc = ((b[:, 0] - a[:, 0]) * (py - a[:, 1]) - (px - a[:, 0]) * (b[:, 1] - a[:, 1])) / whole
        found = torch.stack((1 - wb - wc, wb, wc), -1)  # nan where the face has no area, and then outside
        inside = (found >= -1e-6).all(-1)
        found, pixel, piece = found[inside], (y * width + x)[inside], piece[inside]
        if shows is not None:
            there = shows(piece, found)
            found, pixel, piece = found[there], pixel[there], piece[there]
        depth = (found * triangles[piece, :, 2]).sum(-1)
        nearest.scatter_reduce_(0, pixel, depth, "amin")
        wins = depth <= nearest[pixel]
        shown[pixel[wins]], weights[pixel[wins]] = piece[wins], found[wins]
    return Raster(shown.view(height, width), weights.view(height, width, 3))
