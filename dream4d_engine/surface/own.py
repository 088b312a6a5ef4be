"""Where a mesh's own vertices are over time, once a scene that was made from it moves.

Motion is a function of position: vertices at one place (on the cuts of a texture, where materials meet) are followed as
one point. A mesh coarser than the motion is refined for the while, so that what calms neighbours does not blur its
joints; of a finer one some of its vertices are followed and take the others along (embedded deformation, Sumner et al.
2007).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..mesh import MeshError, edges_of
from ..meshes.record import Model, Placement
from ..scene import Scene
from .look import Progress
from .tracks import folds_note, outside_note, outside_share, track_vertices

SAME = 1e-5  # of the model's size: places nearer than that are one
_LONGEST = 0.04  # of the box's half side: edges that a motion bends within are halved until they are shorter
_MOST = 20_000  # points that are followed one by one
_FINEST = 0.01  # of the box's half side: cells whose vertices are taken along by one of them, where there are more
_REACH = 2.5  # cells, how far a followed point has a say


@dataclass(frozen=True)
class OwnTracks:
    """A model's own vertices over time."""

    positions: Tensor
    """[T, V, 3], in the file's own frame and units."""
    times: Tensor
    """[T] in [0, 1]."""
    unconverged: float
    """The share of places in time that have no inverse in the field; their neighbours carry them."""
    followed: int
    """How many points of the model were followed one by one."""
    outside: float
    """The share of places in time outside of the scene's box (see `outside_share`)."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for people."""
        return tuple(filter(None, (folds_note(self.unconverged), outside_note(self.outside, "the vertices'"))))


@torch.no_grad()
def track_own_vertices(
    scene: Scene, model: Model, placement: Placement, times: Tensor, on_progress: Progress = None
) -> OwnTracks:
    """Follow a model's vertices through times [T] of the scene that was made from it, placed as it was then.

    The zoom of the scene's deformation is taken out: the motion is that of the model itself. Raises MeshError for a
    scene that doesn't move.
    """
    if scene.deformation is None:
        raise MeshError("the scene doesn't move, so there is no motion to give the mesh: animate it first")
    everything, device, radius = model.mesh.vertices, scene.device, scene.config.radius
    used, corners = model.mesh.faces.unique(return_inverse=True)
    own = everything[used]  # what no face names is not seen, may lie anywhere, and stays there
    # on the CPU: not every device has numbers precise enough to tell the places of a large mesh apart
    found, at = _distinct(placement.to_world(own), SAME * model.mesh.size * placement.scale)
    everything, used, own = everything.to(device), used.to(device), own.to(device)
    points, of = found.to(device), at.to(device)
    faces = of[corners.to(device)]
    faces = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])]
    if len(points) > _MOST:
        chosen, of_chosen, cell = _sparse(points, radius)
        few, few_faces, n = points[chosen], of_chosen[faces], len(chosen)
    else:
        few, few_faces = _refined(points, faces, _LONGEST * radius)
        n = len(points)
    tracks = track_vertices(scene, few, few_faces, times.to(scene.device), on_progress)
    moved = tracks.positions[:, :n] / scene.deformation.config.scale - few[:n]
    if len(points) > _MOST:
        moved = _taken_along(points, chosen, of_chosen, edges_of(few_faces), moved, cell)
    positions = everything.repeat(len(moved), 1, 1)
    positions[:, used] = torch.stack([own + placement.directions_from_world(at)[of] for at in moved])
    share = float(tracks.carried[:, :n].float().mean()) if n else 0.0
    return OwnTracks(positions.cpu(), times.cpu(), share, n, outside_share(tracks.positions[:, :n], radius))


def _distinct(points: Tensor, near: float) -> tuple[Tensor, Tensor]:
    """Return the places [U, 3] of points [V, 3] that lie apart, and which of them each point is at [V].

    Points are one if they share a cell of a lattice, or of the lattice half a cell on: so no border parts them.
    """
    group = torch.arange(len(points), device=points.device)
    for shift in (0.0, 0.5, 0.0):
        cells = (points.double() / max(near, 1e-30) + shift).round()
        _, cell = torch.unique(cells, dim=0, return_inverse=True)
        least = torch.full((int(cell.max()) + 1,), len(points), device=points.device)
        group = least.scatter_reduce(0, cell, group, "amin")[cell]
        group = group[group]
    first, of = torch.unique(group, return_inverse=True)
    return points[first], of


def _refined(points: Tensor, faces: Tensor, longest: float) -> tuple[Tensor, Tensor]:
    """Add points in the middle of edges until none is longer; the first ones stay what they are."""
    while True:
        sides = points[faces] - points[faces].roll(1, 1)
        long = sides.norm(dim=-1).amax(1) > longest
        if not bool(long.any()) or len(points) > _MOST:
            return points, faces
        a, b, c = faces[long].unbind(1)
        pairs = torch.stack((torch.stack((a, b), 1), torch.stack((b, c), 1), torch.stack((c, a), 1)), 1)
        edges, at = torch.unique(pairs.reshape(-1, 2).sort(-1).values, dim=0, return_inverse=True)
        ab, bc, ca = (at.view(-1, 3) + len(points)).unbind(1)
        points = torch.cat((points, points[edges].mean(1)))
        parts = [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
        faces = torch.cat((faces[~long], *(torch.stack(part, 1) for part in parts)))


def _sparse(points: Tensor, radius: float) -> tuple[Tensor, Tensor, float]:
    """Return some of the points [K], which of them each point goes with [U], and the side of the cells they share."""
    cell = _FINEST * radius
    while True:
        _, of = torch.unique((points / cell).floor(), dim=0, return_inverse=True)
        n = int(of.max()) + 1
        if n <= _MOST:
            break
        cell *= 1.25
    count = torch.zeros(n, device=points.device).index_add_(0, of, torch.ones_like(points[:, 0]))
    middle = torch.zeros(n, 3, device=points.device).index_add_(0, of, points) / count[:, None]
    off = (points - middle[of]).norm(dim=-1)
    order = torch.argsort(off, descending=True)  # the nearest to the middle is written last, and stays
    chosen = torch.zeros(n, dtype=torch.int64, device=points.device)
    nearest = torch.full((n,), torch.inf, device=points.device).scatter_reduce_(0, of, off, "amin")
    wins = order[off[order] <= nearest[of[order]]]
    chosen[of[wins]] = wins
    return chosen, of, cell


def _taken_along(points: Tensor, chosen: Tensor, of: Tensor, edges: Tensor, moved: Tensor, cell: float) -> Tensor:
    """Return the ways [T, U, 3] of all points from those [T, K, 3] of the chosen ones.

    A chosen point takes its surroundings along by the affine map that its neighbours' ways fit best; a point follows
    the chosen one of its cell and that one's neighbours, the near ones more.
    """
    k, device = len(chosen), points.device
    both = torch.cat((edges, edges.flip(-1)))
    both = both[both[:, 0].argsort(stable=True)]
    start, end = both.unbind(-1)
    apart = points[chosen[end]] - points[chosen[start]]  # [E, 3]
    square = torch.zeros(k, 3, 3, device=device).index_add_(0, start, apart[:, :, None] * apart[:, None])
    # off the surface nothing says how the motion goes on: there the map stays as it is
    square = square + 0.05 * cell**2 * torch.eye(3, device=device)
    n_around = torch.bincount(start, minlength=k)
    first = n_around.cumsum(0) - n_around
    rows = n_around[of] + 1  # the point's own chosen one, and that one's neighbours
    point = torch.arange(len(points), device=device).repeat_interleave(rows)
    place = torch.arange(len(point), device=device) - (rows.cumsum(0) - rows).repeat_interleave(rows)
    own = of[point]
    said = torch.where(
        place == 0, own, end[(first[own] + place - 1).clamp(0, max(len(end) - 1, 0))] if len(end) else own
    )
    off = points[point] - points[chosen[said]]
    weight = (1 - off.norm(dim=-1) / (_REACH * cell)).clamp_min(0).square()
    weight = torch.where(place == 0, weight.clamp_min(1e-6), weight)
    total = torch.zeros(len(points), device=device).index_add_(0, point, weight)
    weight = (weight / total[point])[:, None]
    found = []
    for way in moved:
        outer = (way[end] - way[start])[:, :, None] * apart[:, None]
        slopes = torch.linalg.solve(square, torch.zeros(k, 3, 3, device=device).index_add_(0, start, outer).mT).mT
        told = way[said] + (slopes[said] @ off[..., None])[..., 0]
        found.append(torch.zeros_like(points).index_add_(0, point, weight * told))
    return torch.stack(found)
