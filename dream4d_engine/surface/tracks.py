"""Where points of the canonical surface are over time: the inverse of the field's backward warp.

The field says where a place x of the world at time t is looked up: w(x, t) = c. A vertex c of the canonical surface is
sought: x with w(x, t) = c, from where it was at the moment before. Lengths are in units of the [0, 1] box. What was
changed of the motion (`fields.edit`) is written down for things at rest, so it is applied to the ways found.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..fields.deformation import DeformationField
from ..kernels import Kernels
from ..mesh import MeshError, edges_of, smoothed
from ..scene import Scene
from .look import AT_ONCE, Progress

CONVERGED = 5e-4  # a residual that need not get smaller: a quarter of the cell of a lattice of 512
LOST = 5e-3  # a larger one: here the warp has no inverse
_STEP = 1 / 24  # the longest stretch of time crossed at once: continuation needs its start to be near
_FIXED_POINT, _DAMPING = 8, 0.7  # contracts where |d displacement / dx| < 1; the damping bears more of it
_LONGEST = 0.05  # step of Newton's method
_STRAY = 0.05  # off the place that its neighbours give it, a vertex has gone to another branch of a fold
_REACH = 0.1  # off that place, an inverse that is looked for belongs to another part of the object
_SLOPES_AT_ONCE = 2**15  # places, so that a large mesh takes no more memory than a small one
_CANDIDATES = 6  # places that a lost vertex starts from anew


@dataclass(frozen=True)
class Tracks:
    """Vertices over time, and how sure of them one may be."""

    positions: Tensor
    """[T, V, 3] in the world."""
    residual: Tensor
    """[T, V], |w(x, t) - c| in units of the box's side before smoothing, also of those that were carried."""
    carried: Tensor
    """[T, V] bool: no inverse there; placed by a rigid fit of the neighbours."""

    @property
    def unconverged(self) -> float:
        """The share of vertices and times that were carried."""
        return float(self.carried.float().mean()) if self.carried.numel() else 0.0


def outside_share(positions: Tensor, radius: float) -> float:
    """The share of positions [..., 3] that lie outside of a scene's box, or on its sides: images cut it off there.

    What a trained motion takes out of the box has no inverse, and most of it, not all, is followed to a side.
    """
    out = (positions.abs() >= radius * (1 - 1e-6)).any(-1)
    return float(out.float().mean()) if out.numel() else 0.0


def outside_note(share: float, whose: str) -> str:
    """What to say of a share of places outside of a scene's box, "the vertices'" say; "" where hardly any are."""
    if share < 5e-4:  # would read as 0.0 %
        return ""
    return (
        f"{share:.1%} of {whose} places in time lie outside of the scene's box, where images cut them off: less "
        "strength keeps them in it"
    )


def folds_note(unconverged: float) -> str:
    """What to say of a share of vertices' places in time that have no inverse; "" where hardly any have none."""
    if unconverged < 5e-5:  # would read as 0.00 %
        return ""
    return (
        f"{unconverged:.2%} of the vertices' places in time have no inverse (the motion folds there): carried by their "
        "neighbours"
    )


@dataclass(frozen=True)
class Precision:
    """How hard inverses are looked for."""

    converged: float = CONVERGED
    """The residual that need not get smaller, in units of the box's side."""
    rounds: int = 12
    """Of Newton's method, at most."""
    lattice: int = 40
    """Points a side of the lattice over the object that a lost vertex may start from anew."""


class _Warp:
    """w(x, t) at one time: not clamped to the box, so that it has slopes everywhere."""

    def __init__(self, field: DeformationField, kernels: Kernels, time: float, precision: Precision) -> None:
        self.field, self.kernels, self.time = field, kernels, time
        self.scale, self.precision = field.config.scale, precision

    def __call__(self, x: Tensor) -> Tensor:
        parts = []
        for u in x.split(AT_ONCE):
            shift = self.field.displacement(u.clamp(0, 1), u.new_full((len(u),), self.time), self.kernels)
            parts.append((u + shift - 0.5) / self.scale + 0.5)
        return torch.cat(parts) if parts else x

    def with_slopes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return w [S, 3] and its Jacobian [S, 3, 3], dw_i / dx_j."""
        places, slopes = [], []
        for piece in x.split(_SLOPES_AT_ONCE):
            with torch.enable_grad():
                u = piece.detach().clone().requires_grad_()
                w = self(u)
                rows = [torch.autograd.grad(w[:, i].sum(), u, retain_graph=i < 2)[0] for i in range(3)]
            places.append(w.detach())
            slopes.append(torch.stack(rows, 1))
        return torch.cat(places), torch.cat(slopes)


@torch.inference_mode(False)  # a caller's, in which there are no slopes
@torch.no_grad()
def track_vertices(
    scene: Scene, vertices: Tensor, faces: Tensor, times: Tensor, on_progress: Progress = None, smoothing: int = 2
) -> Tracks:
    """Follow vertices [V, 3] of the canonical surface (see `extract_surface`) through times [T].

    `smoothing`: rounds by which the displacements are smoothed over the surface in the end. Where the warp folds,
    neighbours part; this takes half of that away and moves the others by less than the residual that is allowed.
    """
    if scene.deformation is None:
        return _still(vertices, times)
    canonical = (vertices / scene.config.radius + 1) / 2
    rest = _at_rest(canonical, scene.deformation)
    found, row = _follow(scene, canonical, edges_of(faces), times, rest, Precision(), on_progress)
    places = torch.stack([_calmed(place, rest, faces, smoothing) for place in found.positions])
    return _shown(scene, replace(found, positions=places), rest, row)


@torch.inference_mode(False)
@torch.no_grad()
def track_points(
    scene: Scene, points: Tensor, edges: Tensor, times: Tensor, precision: Precision, on_progress: Progress = None
) -> tuple[Tracks, Tensor]:
    """Follow points [V, 3] of the world, where they are at the first of times [T], to the others.

    edges: [E, 2], whom a point that has no inverse goes with. Nothing is smoothed. Returns the tracks, and where each
    point would be if nothing but the zoom displaced it, [V, 3].
    """
    if scene.deformation is None:
        return _still(points, times), points
    radius = scene.config.radius
    canonical = scene.looked_up(points, float(times[0]))
    rest = _at_rest(canonical, scene.deformation)
    # an edit shows the points elsewhere than the trained motion has them: then they are sought from rest on
    start = (points / radius + 1) / 2 if scene.edit.is_nothing else rest
    found, row = _follow(scene, canonical, edges, times, start, precision, on_progress)
    return _shown(scene, found, rest, row), (rest * 2 - 1) * radius


def places_at_rest(scene: Scene, points: Tensor, time: float) -> Tensor:
    """Points [S, 3] of the world at a time -> where what they show is at rest, but for the deformation's zoom."""
    if scene.deformation is None:
        return points
    return (_at_rest(scene.looked_up(points, time), scene.deformation) * 2 - 1) * scene.config.radius


def _still(points: Tensor, times: Tensor) -> Tracks:
    shape = (len(times), len(points))
    still = points.expand(len(times), -1, -1).clone()
    return Tracks(still, points.new_zeros(shape), torch.zeros(shape, dtype=torch.bool, device=points.device))


def _at_rest(canonical: Tensor, field: DeformationField) -> Tensor:
    """Where places of the field would be seen, were there no displacement."""
    return (canonical - 0.5) * field.config.scale + 0.5


def _follow(
    scene: Scene,
    canonical: Tensor,
    edges: Tensor,
    times: Tensor,
    start: Tensor,
    precision: Precision,
    on_progress: Progress,
) -> tuple[Tracks, Tensor]:
    """Follow places of the field [V, 3] through the trained motion: tracks in the box [M, V, 3], and of times [T]
    which of its M moments each shows."""
    assert scene.deformation is not None  # a still scene has nothing to follow
    field = copy.deepcopy(scene.deformation).requires_grad_(False)  # slopes are wanted in x alone
    both, rest = torch.cat((edges, edges.flip(-1))), _at_rest(canonical, field)
    shown = scene.edit.moments(times)
    # in their order, and each once: edited times go back and forth, of a loop 1 is 0, and found anew places would be
    # off by what residuals may be
    moments, row = (shown.remainder(1) if field.config.loop else shown).unique(return_inverse=True)
    x = start.clamp(0, 1)
    rows, moment = [], 0.0 if scene.edit.times else None  # then the first may be far from rest
    for number, goal in enumerate(moments.tolist(), 1):
        between: list[float] = [] if moment is None else _stops(moment, goal)
        for stop in (*between, goal):
            x, residual, carried = _solve(_Warp(field, scene.kernels, stop, precision), canonical, x, rest, both)
        moment = goal
        rows.append((x, residual, carried))
        if on_progress is not None:
            on_progress(number / len(moments))
    places, residuals, carried = (torch.stack(column) for column in zip(*rows, strict=True))
    return Tracks(places, residuals, carried), row


def _shown(scene: Scene, found: Tracks, rest: Tensor, row: Tensor) -> Tracks:
    """Bring tracks of the trained motion, in the box, to what is shown of it, in the world."""
    radius, edit = scene.config.radius, scene.edit
    places = (edit.places(rest, found.positions, radius) * 2 - 1) * radius
    carried = found.carried & (edit.share((2 * rest - 1) * radius) > 0)
    return Tracks(places[row], found.residual[row], carried[row])


def _calmed(places: Tensor, rest: Tensor, faces: Tensor, rounds: int) -> Tensor:
    """Smooth the ways from `rest` to `places` over the surface, but for what of them is one affine map of all."""
    ones = torch.ones_like(rest[:, :1])
    at = torch.cat((rest, ones), -1)
    affine = at @ torch.linalg.lstsq(at, places, driver="gels" if places.is_cuda else "gelsd").solution
    return affine + smoothed(places - affine, faces, rounds)


def _stops(start: float, end: float) -> list[float]:
    """Moments between two, so that none is farther from the last than _STEP."""
    n = max(1, round((end - start) / _STEP + 0.49))
    return [start + (end - start) * k / n for k in range(1, n)]


def _solve(warp: _Warp, canonical: Tensor, start: Tensor, rest: Tensor, both: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return places [V, 3], residuals [V] and who was carried [V], from the places of the moment before.

    The rings of those that are carried have the shape that they have at rest: the moment before may have been wrong.
    """
    x, residual = _fixed_point(warp, canonical, start)
    if not (x.isfinite().all() and residual.isfinite().all()):  # no round has found a number
        raise MeshError("the scene's deformation is not a finite number everywhere: animate it anew")
    x, residual = _newton(warp, canonical, x, residual)
    known = residual <= LOST
    told, can = _rigid_places(x, start, both, known)
    # what is far from where its neighbours say sits on another branch of a fold
    known &= ~(can & ((x - told).norm(dim=-1) > _STRAY))
    lost = (~known).nonzero()[:, 0]
    if len(lost):
        told, can = _rigid_places(x, rest, both, known)
        told = torch.where(can[:, None], told, start)[lost]
        found, good = _search(warp, canonical[lost], told, start)
        x, known = x.index_copy(0, lost, found), known.index_copy(0, lost, good)
    inverted = known.clone()
    while not bool(known.all()):  # from the border of a gap inwards
        told, can = _rigid_places(x, rest, both, known)
        ready = can & ~known
        if not bool(ready.any()):  # nobody around is known: they stay where they were
            x = torch.where(known[:, None], x, start)
            break
        x = torch.where(ready[:, None], told.clamp(0, 1), x)
        known |= ready
    return x, (warp(x) - canonical).norm(dim=-1), ~inverted


def _search(warp: _Warp, goals: Tensor, told: Tensor, around: Tensor) -> tuple[Tensor, Tensor]:
    """Look for inverses of the warp on a lattice over the object; return the one nearest to where each vertex is told
    to be, and whether there is one near."""
    margin = 0.05
    ticks = [
        torch.linspace(low, high, warp.precision.lattice, device=goals.device)
        for low, high in zip(
            (around.amin(0) - margin).clamp_min(0).tolist(),
            (around.amax(0) + margin).clamp_max(1).tolist(),
            strict=True,
        )
    ]
    lattice = torch.cartesian_prod(*ticks)
    images = warp(lattice)
    best, nearest = told.clone(), torch.full_like(told[:, 0], _REACH)
    for rows in torch.arange(len(goals), device=goals.device).split(256):
        starts = torch.cdist(goals[rows], images).topk(_CANDIDATES, largest=False).indices
        places = lattice[starts].reshape(-1, 3)
        wanted = goals[rows].repeat_interleave(_CANDIDATES, 0)
        places, left = _newton(warp, wanted, places, (warp(places) - wanted).norm(dim=-1))
        off = (places.view(len(rows), -1, 3) - told[rows, None]).norm(dim=-1)
        off = off.masked_fill(left.view(len(rows), -1) > LOST, torch.inf)
        least, which = off.min(-1)
        better = least < nearest[rows]
        chosen = places.view(len(rows), -1, 3)[torch.arange(len(rows), device=goals.device), which]
        best[rows[better]], nearest[rows[better]] = chosen[better], least[better]
    return best, nearest < _REACH


def _fixed_point(warp: _Warp, goals: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best places of some rounds x <- x - damping * scale * (w(x) - c), and their residuals."""
    x, best, least = start, start.clone(), torch.full_like(start[:, 0], torch.inf)
    open_ = torch.arange(len(start), device=start.device)
    for _ in range(_FIXED_POINT):
        off = warp(x) - goals[open_]
        size = off.norm(dim=-1)
        better = size < least[open_]
        best[open_[better]], least[open_[better]] = x[better], size[better]
        going = size > warp.precision.converged
        open_, x, off = open_[going], x[going], off[going]
        if not len(open_):
            break
        x = (x - _DAMPING * warp.scale * off).clamp(0, 1)
    return best, least


def _newton(warp: _Warp, goals: Tensor, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Improve the places that have not converged by Newton's method; a step that makes it worse is halved."""
    x, residual = x.clone(), residual.clone()
    damp = torch.ones_like(residual)
    for _ in range(warp.precision.rounds):
        open_ = ((residual > warp.precision.converged) & (damp > 0.1)).nonzero()[:, 0]
        if not len(open_):
            break
        w, slopes = warp.with_slopes(x[open_])
        # Levenberg's term keeps the step finite where the Jacobian is singular, as on the edge of a fold
        square = slopes.mT @ slopes + 1e-4 * torch.eye(3, device=x.device)
        step = torch.linalg.solve(square, slopes.mT @ (w - goals[open_])[..., None])[..., 0]
        length = step.norm(dim=-1, keepdim=True)
        step = step * (_LONGEST / length.clamp_min(_LONGEST)) * damp[open_, None]
        tried = (x[open_] - step).clamp(0, 1)
        size = (warp(tried) - goals[open_]).norm(dim=-1)
        better = size < residual[open_]
        x[open_[better]], residual[open_[better]] = tried[better], size[better]
        damp[open_] = torch.where(better, damp[open_].mul(2).clamp_max(1), damp[open_] / 2)
    return x, residual


def _rigid_places(x: Tensor, before: Tensor, both: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each vertex would be, were its ring's known vertices moved rigidly since `before`; and who has any.

    The rotation is the one that fits best (Kabsch 1976); with fewer than three known neighbours there is none.
    """
    of, neighbour = both[known[both[:, 1]]].unbind(-1)
    n = torch.zeros(len(x), device=x.device).index_add_(0, of, torch.ones(len(of), device=x.device))
    share = n.clamp_min(1)[:, None]
    old = torch.zeros_like(x).index_add_(0, of, before[neighbour]) / share
    new = torch.zeros_like(x).index_add_(0, of, x[neighbour]) / share
    outer = (before[neighbour] - old[of])[:, :, None] * (x[neighbour] - new[of])[:, None]
    covariance = x.new_zeros(len(x), 3, 3).index_add_(0, of, outer)
    u, _, vt = torch.linalg.svd(covariance)
    mirrored = torch.linalg.det(u @ vt) < 0
    vt = torch.cat((vt[:, :2], torch.where(mirrored[:, None, None], -vt[:, 2:], vt[:, 2:])), 1)
    rotation = vt.mT @ u.mT
    turned = (rotation @ (before - old)[..., None])[..., 0]
    return new + torch.where((n >= 3)[:, None], turned, before - old), n > 0
