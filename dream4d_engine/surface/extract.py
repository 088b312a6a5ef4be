"""The surface of a scene at one moment: where to look, marching cubes, and what makes the result fit to be used."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..fields.encodings import require_range
from ..mesh import Mesh, MeshError, edges_of, face_normals, smoothed, vertex_normals, without_unused
from ..scene import Scene
from .colors import surface_colors
from .libraries import library
from .look import Look, Progress, density_at, in_pieces
from .silhouettes import find_threshold

_COARSE = 48  # cells a side of the first lattice over the whole box
_BLOCK = 4  # fine cells a side of what is looked at, or not, as one
_WITHIN_REACH = 0.05  # of the threshold: density that may hide a thin part between the coarse points
_HIDDEN = 0.35  # optical depth: behind 30 % of opacity from every side, nothing tells a cave from a solid
_SMALL = 0.02  # of the largest component's area: less is a speck


@dataclass(frozen=True)
class SurfaceOptions:
    """How a surface is made."""

    resolution: int = 128
    """Cells along the longest side of the box around the object."""
    threshold: float | None = None
    """The density that is the surface; None: found by silhouettes."""
    n_faces: int = 20_000
    """Faces that decimation leaves, at most; 0 for all."""
    smoothing: int = 4
    """Rounds of smoothing; 0 for none."""
    keep_specks: bool = False
    """Keep components of less than 2 % of the largest one's area."""
    colors: bool = True
    """Colour the vertices."""

    def __post_init__(self) -> None:
        require_range("resolution", self.resolution, 8, 1024)
        require_range("smoothing", self.smoothing, 0, 100)
        require_range("n_faces", self.n_faces, 0, 10_000_000)
        if self.threshold is not None:
            require_range("threshold", self.threshold, 1e-6, 1e8)


@dataclass(frozen=True)
class Surface:
    """A mesh, and what is to be said of how it came about."""

    mesh: Mesh
    threshold: float
    """The density that it lies at."""
    silhouette_iou: float | None
    """Of the threshold's silhouettes with the renderer's, None where the threshold was given."""
    notes: tuple[str, ...]
    """Sentences for people."""


def extract_surface(
    scene: Scene, time: float | None = None, options: SurfaceOptions | None = None, on_progress: Progress = None
) -> Surface:
    """Extract the surface at a moment; `time` None: in the canonical field, whose points `track_vertices` moves.

    Raises MeshError where there is no surface.
    """
    options = options or SurfaceOptions()
    notes: list[str] = []
    report = on_progress or (lambda share: None)
    density, iou, threshold = density_at(scene, time), None, options.threshold
    report(0.0)
    if threshold is None:
        threshold, iou = find_threshold(scene, time)
    report(0.2)
    low, high = _bounds(density, threshold, scene, notes)
    report(0.3)
    values, cell = _lattice(density, threshold, low, high, options.resolution, lambda share: report(0.3 + 0.4 * share))
    vertices, faces = _marching_cubes(_filled(values, threshold, cell), low, cell)
    report(0.75)
    vertices, faces = _main_components(vertices, faces, options.keep_specks, notes)
    if options.smoothing:
        vertices = smoothed(vertices, faces, options.smoothing)
    vertices, faces = _decimated(vertices, faces, options.n_faces)
    report(0.9)
    vertices = vertices.clamp(-scene.config.radius, scene.config.radius)
    normals = vertex_normals(vertices, faces)
    colors = surface_colors(scene, time, vertices, normals, cell) if options.colors else None
    report(1.0)
    return Surface(Mesh(vertices, faces, normals, colors), threshold, iou, tuple(notes))


def _bounds(density: Look, threshold: float, scene: Scene, notes: list[str]) -> tuple[Tensor, Tensor]:
    """Return the corners of a box of the world that holds everything at least as dense as the threshold."""
    radius, device = scene.config.radius, scene.device
    ticks = torch.linspace(-radius, radius, _COARSE + 1, device=device)
    dense = in_pieces(density, torch.cartesian_prod(ticks, ticks, ticks)).view([_COARSE + 1] * 3)
    inside = dense >= threshold
    border = torch.ones_like(inside)
    border[1:-1, 1:-1, 1:-1] = False
    cut = float(inside[border].float().mean())
    if cut > 0.5:
        raise MeshError("the scene's field fills its box: it has no surface inside; train it anew, or for longer")
    if cut > 0:
        notes.append("the object reaches the border of its box and is cut off there")
    found = (dense >= _WITHIN_REACH * threshold).nonzero()
    if not len(found):
        raise MeshError(f"the scene is empty: nowhere is its density near the threshold of {threshold:g}")
    margin = 1.5 * (ticks[1] - ticks[0])  # what is thinner than a coarse cell may reach that far beyond
    low, high = ticks[found.amin(0)] - margin, ticks[found.amax(0)] + margin
    return low.clamp_min(-radius), high.clamp_max(radius)


def _lattice(
    density: Look, threshold: float, low: Tensor, high: Tensor, resolution: int, on_progress: Progress
) -> tuple[Tensor, float]:
    """Return log(density / threshold) on a lattice from `low` on, and its cell's side.

    The field is asked at each fourth point first, and at all points of those blocks only that the surface may pass
    through; what is elsewhere is interpolated, its side of the surface being known.
    """
    cell = float((high - low).max()) / resolution
    n_blocks = [max(1, int(n)) for n in ((high - low) / (cell * _BLOCK)).ceil().tolist()]
    coarse = _points(low, cell * _BLOCK, [n + 1 for n in n_blocks])
    first = _level(in_pieces(density, coarse.reshape(-1, 3)), threshold).view(coarse.shape[:3])
    # a block is looked at if it or a neighbour holds both sides, or comes near the threshold from below
    near = functional.max_pool3d(first[None, None], 2, 1)[0, 0] > torch.tensor(_WITHIN_REACH).log()
    deep = -functional.max_pool3d(-first[None, None], 2, 1)[0, 0] > 0
    near = functional.max_pool3d(near.float()[None, None], 3, 1, 1)[0, 0] > 0
    deep = -functional.max_pool3d(-deep.float()[None, None], 3, 1, 1)[0, 0] > 0
    blocks = near & ~deep
    n_points = [n * _BLOCK + 1 for n in n_blocks]
    values = functional.interpolate(first[None, None], n_points, mode="trilinear", align_corners=True)[0, 0].clone()
    wanted = torch.zeros(n_points, dtype=torch.bool, device=values.device)
    full = blocks.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1).repeat_interleave(_BLOCK, 2)
    for dx in (0, 1):  # a block's points are those of its cells' eight corners
        for dy in (0, 1):
            for dz in (0, 1):
                wanted[dx : dx + full.shape[0], dy : dy + full.shape[1], dz : dz + full.shape[2]] |= full
    places = wanted.nonzero()
    values[wanted] = _level(in_pieces(density, low + places * cell, on_progress), threshold)
    return values, cell


def _filled(values: Tensor, threshold: float, cell: float) -> Tensor:
    """Return the lattice with all solid that cannot be seen into.

    A field is trained on what is seen of it: behind its skin there may be caves, which would become a surface of their
    own. A point is hidden if along each of 26 ways out there is more than _HIDDEN of optical depth.
    """
    depth_of_cell = values.exp() * (threshold * cell)
    least = torch.full_like(values, torch.inf)
    for way in itertools.product((-1, 0, 1), repeat=3):
        axis = next((k for k in range(3) if way[k]), None)
        if axis is None:
            continue
        # from slice to slice along the first axis that it moves along, shifted along the two others
        order = [k for k in range(3) if k != axis]
        cells = depth_of_cell.movedim(axis, 0) * math.sqrt(sum(abs(k) for k in way))
        deepest = least.movedim(axis, 0)
        slices = range(len(cells)) if way[axis] > 0 else range(len(cells) - 1, -1, -1)
        depth = torch.zeros_like(cells[0])
        for i in slices:
            deepest[i] = torch.minimum(deepest[i], depth)  # `deepest` looks into `least`
            depth = _shifted(depth + cells[i], way[order[0]], way[order[1]])
    return torch.where(least > _HIDDEN, values.clamp_min(1.0), values)


def _shifted(image: Tensor, down: int, right: int) -> Tensor:
    """Move an image [X, Y] by a cell or none; what comes in is 0."""
    height, width = image.shape
    image = functional.pad(image, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)))
    return image[max(-down, 0) :, max(-right, 0) :][:height, :width]


def _level(density: Tensor, threshold: float) -> Tensor:
    """Density grows about exponentially through a surface: its logarithm is what can be interpolated linearly."""
    return (density / threshold).clamp_min(1e-4).log()


def _points(low: Tensor, cell: float, shape: list[int]) -> Tensor:
    """Return the points [X, Y, Z, 3] of a lattice."""
    axes = [low[k] + cell * torch.arange(n, device=low.device) for k, n in enumerate(shape)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def _marching_cubes(values: Tensor, low: Tensor, cell: float) -> tuple[Tensor, Tensor]:
    """Return vertices and faces of the surface at 0, closed at the lattice's border."""
    lattice = functional.pad(values, [1] * 6, value=-1.0)
    if not bool((lattice > 0).any()):
        raise MeshError("the scene is empty: there is no surface at this threshold")
    # (2003, Lewiner et al.): topologically correct
    found, faces, *_ = library("skimage.measure").marching_cubes(lattice.cpu().numpy(), 0.0)
    vertices = low + (torch.from_numpy(found.copy()).to(low) - 1) * cell
    faces = torch.from_numpy(faces.copy()).to(low.device, torch.int64)
    a, b, c = vertices[faces].unbind(1)
    if float((a * torch.linalg.cross(b, c)).sum()) < 0:  # six times the volume: negative if turned inside out
        faces = faces.flip(-1)
    return vertices, faces


def _main_components(vertices: Tensor, faces: Tensor, keep_specks: bool, notes: list[str]) -> tuple[Tensor, Tensor]:
    """Drop cavities, which nobody sees, and specks."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = edges_of(faces).cpu().numpy()
    links = coo_matrix((edges[:, 0] * 0 + 1, (edges[:, 0], edges[:, 1])), shape=(len(vertices), len(vertices)))
    n, label = connected_components(links, directed=False)
    of_face = torch.from_numpy(label).to(faces)[faces[:, 0]]
    area = torch.zeros(n, device=vertices.device).index_add_(0, of_face, face_normals(vertices, faces).norm(dim=-1))
    a, b, c = vertices[faces].unbind(1)
    volume = torch.zeros(n, device=vertices.device).index_add_(0, of_face, (a * torch.linalg.cross(b, c)).sum(-1))
    outer = volume > 0
    if not bool(outer.any()):
        raise MeshError("the scene has no surface that is seen from outside")
    small = area < _SMALL * area[outer].max()
    if keep_specks:
        small = torch.zeros_like(small)
    if dropped := int((small & outer).sum()):
        specks = "speck" if dropped == 1 else "specks"
        notes.append(f"{dropped} {specks} of less than {_SMALL:.0%} of the largest part's area left out")
    return without_unused(vertices, faces[(outer & ~small)[of_face]])


def _decimated(vertices: Tensor, faces: Tensor, n_faces: int) -> tuple[Tensor, Tensor]:
    """Collapse edges, those first that change the shape least (quadric error, Garland and Heckbert 1997)."""
    if not n_faces or len(faces) <= n_faces:
        return vertices, faces
    points, found = library("fast_simplification").simplify(
        vertices.cpu().numpy(), faces.cpu().numpy().astype("int32"), target_count=n_faces
    )
    if not len(found):
        raise MeshError(f"{n_faces} faces are too few: none of the surface's {len(faces):,} is left; ask for more")
    return without_unused(torch.from_numpy(points).to(vertices), torch.from_numpy(found).to(faces))
