"""How much a scene moves: points of its surface, followed through its motion, and what can be said of their ways.

The points are where rays from all around end at the first moment, one in each cell of a lattice over the object, so
that they cover what is seen of it evenly. Lengths are told in sizes of the object: the longest side of the box around
it at rest. No mesh is made, and nothing beyond PyTorch is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..mesh import MeshError
from ..rays import RayBundle, RaySamples, rays_from_cameras
from ..rendering import RenderOptions, View, render_view
from ..rendering.march import is_visible, points_of, sample_rays
from ..scene import Scene
from .look import AT_ONCE, Progress, require_finite
from .silhouettes import silhouette_cameras
from .tracks import Precision, outside_share, places_at_rest, track_points

N_TIMES = 25
"""Moments, as far apart as tracks are followed in one go."""
MOVES = 0.02
"""Displacement, in sizes, from which on a point counts as moving: a pixel of an object that is drawn 50 pixels tall."""
_IMAGE_SIZE = 32  # pixels a side of a view: about one to a cell where the object fills half of the frame
_HALF = math.log(2)  # optical depth behind which half of the light is left
_FINE = 12  # pieces of one and a half samples, by which a point is put where the surface is
_CELLS = 14  # along the object's longest side
_NEIGHBOURS = 8
_PRECISION = Precision(5e-5, 6, 20)  # of the box: some thousandth of the distance of neighbours, whose changes are told
_RESTING = 128  # points that flicker is looked for at, at most
_FROZEN = 0.005  # share of its way: a step of the 8 bits of a mask
_RAYS_AT_ONCE = 2**12


@dataclass(frozen=True)
class SurfaceMotion:
    """Points of a scene's surface and where they go. Lengths in world units."""

    times: Tensor
    """[T] in [0, 1], ascending from 0 to 1."""
    positions: Tensor
    """[T, V, 3]. V is 0 where there is nothing to be seen."""
    rest: Tensor
    """[V, 3], where a point would be if nothing but the zoom of the deformation displaced it."""
    pairs: Tensor
    """[E, 2], near points: each with those that are nearest to it at the first moment."""
    carried: Tensor
    """[T, V] bool: the motion has no inverse there; the point goes with its neighbours."""
    origins: Tensor
    """[V, 3] of the rays that the points were seen along at the first moment."""
    directions: Tensor
    """[V, 3] of these, unit length."""

    @property
    def size(self) -> float:
        """The longest side of the box around the points at rest; 0 where there are none."""
        return float((self.rest.amax(0) - self.rest.amin(0)).max()) if len(self.rest) else 0.0

    @property
    def displacement(self) -> Tensor:
        """[T, V], how far each point is from where it was at the first moment, in sizes."""
        return (self.positions - self.positions[:1]).norm(dim=-1) / max(self.size, 1e-12)


@dataclass(frozen=True)
class MotionReadout:
    """How much a scene moves. Lengths are in sizes of the object; all is 0 for a scene that is still, or empty."""

    n_points: int
    """Points of the surface that were followed; 0: the scene is empty."""
    size: float
    """Of the object, in world units: the longest side of the box around it at rest."""
    mean_displacement: float
    """How far a point is from where it was at the first moment: mean over the surface and the moments."""
    peak_displacement: float
    """The largest such distance."""
    moving_share: float
    """The share of the surface that is ever displaced by more than MOVES."""
    strain: float
    """How far distances between near points change: mean of |distance - distance at rest| over pairs and moments, as a
    share of the mean distance at rest. 0 is rigid."""
    loop_gap: float
    """How far a point at the last moment is from where it was at the first, mean over the surface."""
    loop_gap_steps: float
    """The same as a multiple of how far a point goes between neighbouring ones of N_TIMES moments, on average; at most
    about 1 where the motion is a loop."""
    flicker: float | None
    """How far the colours of what never moves (see MOVES) change between neighbouring moments: mean absolute
    difference in [0, 1] of the pixels that show it. None: all of it moves, so this can't be told."""
    folded: float
    """The share of points and moments where the motion has no inverse: there it folds or tears the surface."""
    outside: float | None = None
    """The share of points and moments outside of the scene's box, where images cut the object off; of what the motion
    as it was trained takes out of it, most (see `outside_share`). None: in records of before."""

    @property
    def line(self) -> str:
        """One line for people."""
        if not self.n_points:
            return "empty: there is nothing to be seen that could move"
        if self.moving_share:
            parts = [
                f"moves {self.mean_displacement:.2f} of its size on average, {self.peak_displacement:.2f} at most",
                f"{100 * self.moving_share:.0f} % of the surface",
                f"distances kept to {100 * self.strain:.1f} %",
                f"first and last moment {self.loop_gap:.2f} apart",
            ]
        else:
            much = self.peak_displacement >= 5e-4  # what would not read as 0.000
            parts = [f"still: moves {self.peak_displacement:.3f} of its size at most" if much else "still"]
        if self.folded >= 5e-4:  # what would read as 0.0
            parts.append(f"folds or tears in {100 * self.folded:.1f} % of places and moments")
        if self.outside is not None and self.outside >= 5e-4:
            parts.append(f"cut off outside of the scene's box in {100 * self.outside:.1f} % of places and moments")
        if self.flicker is not None and self.flicker >= 5e-4:
            parts.append(f"what rests flickers by {self.flicker:.3f}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain values, ready for JSON."""
        return asdict(self)


@torch.no_grad()
def measure_motion(scene: Scene, motion: SurfaceMotion | None = None, on_progress: Progress = None) -> MotionReadout:
    """Say how much a scene moves; `motion`: its surface's, if that was followed before (`follow_surface`).

    Raises MeshError where the field is not a finite number everywhere.
    """
    report = on_progress or (lambda share: None)
    if motion is None:
        motion = follow_surface(scene, on_progress=lambda share: report(0.8 * share))
    n_points = len(motion.rest)
    if not n_points or scene.deformation is None:
        report(1.0)
        return MotionReadout(
            n_points, motion.size, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, None if not n_points else 0.0, 0.0, 0.0
        )
    size, displacement = motion.size, motion.displacement
    largest = displacement.amax(0)
    one, other = motion.positions[:, motion.pairs].unbind(2)
    now = (one - other).norm(dim=-1)
    before = (motion.rest[motion.pairs[:, 0]] - motion.rest[motion.pairs[:, 1]]).norm(dim=-1)
    gap = float(displacement[-1].mean())
    step = float(motion.positions.diff(dim=0).norm(dim=-1).mean()) / size
    flicker = _flicker(scene, motion, largest <= MOVES, lambda share: report(0.8 + 0.2 * share))
    report(1.0)
    return MotionReadout(
        n_points=n_points,
        size=size,
        mean_displacement=float(displacement.mean()),
        peak_displacement=float(largest.max()),
        moving_share=float((largest > MOVES).float().mean()),
        strain=float((now - before).abs().mean() / before.mean()) if len(before) else 0.0,
        loop_gap=gap,
        loop_gap_steps=gap / step if step > 1e-7 else 0.0,
        flicker=flicker,
        folded=float(motion.carried.float().mean()),
        outside=outside_share(motion.positions, scene.config.radius),
    )


@torch.no_grad()
def follow_surface(scene: Scene, n_times: int = N_TIMES, on_progress: Progress = None) -> SurfaceMotion:
    """Find points of the surface that is seen at the first moment, and where they go.

    Takes seconds of one CPU core for the small scenes. An empty scene gives no points. Raises MeshError where the
    field or the deformation is not a finite number everywhere.
    """
    if n_times < 2:
        raise ValueError(f"a motion has at least 2 moments, got n_times {n_times}")
    report = on_progress or (lambda share: None)
    device, times = scene.device, torch.linspace(0, 1, n_times)
    rays = rays_from_cameras(silhouette_cameras(scene, 0.0, _IMAGE_SIZE).to(device))
    rays, points = _hits(scene, rays)
    if not len(points):
        none = points.expand(n_times, 0, 3)
        pairs = torch.zeros(0, 2, dtype=torch.int64, device=device)
        report(1.0)
        return SurfaceMotion(times, none, points, pairs, none[..., 0] > 0, points, points)
    near = _near_pairs(points)
    tracks, rest = track_points(scene, points, near, times, _PRECISION, lambda share: report(0.2 + 0.8 * share))
    return SurfaceMotion(times, tracks.positions, rest, near, tracks.carried, rays.origins, rays.directions)


def leaves_box(scene: Scene) -> float:
    """The share of a scene's surface, over time, outside of its box (see `outside_share`); a look of some seconds.

    0 where it has none, or none that can be followed.
    """
    try:
        return outside_share(follow_surface(scene).positions, scene.config.radius)
    except MeshError:
        return 0.0


@torch.no_grad()
def what_is_frozen(before: Scene, after: Scene) -> str:
    """How much of the surface a change of the motion lets keep still, in words; `after` is `before`, edited.

    Points that are seen all around at the first moment are counted. "" where there are none.
    """
    rays = rays_from_cameras(silhouette_cameras(before, 0.0, _IMAGE_SIZE).to(before.device))
    places = places_at_rest(before, _hits(before, rays)[1], 0.0)
    if not len(places):
        return ""
    was, now = (replace(scene.edit, strength=1.0).share(places) for scene in (before, after))
    if torch.equal(was, now):
        return "what was frozen holds nothing of the surface: all of it moves as before"
    frozen = float((now <= _FROZEN).float().mean())
    return "all of the surface is frozen: nothing moves" if frozen == 1 else f"{frozen:.0%} of the surface is frozen"


def _hits(scene: Scene, rays: RayBundle) -> tuple[RayBundle, Tensor]:
    """Return some rays that end, spread over what they end at, and the points [S, 3] where half of their light is gone.

    A sample is as dense as its middle: the surface lies where the light goes after a closer look around it.
    """
    samples = sample_rays(scene, rays)
    hit, index, before = _crossings(scene, rays, samples, torch.zeros_like(rays.times), RenderOptions().alpha_threshold)
    rays, starts, ends = _some(rays, hit), samples.t_starts[index], samples.t_ends[index]
    if not len(hit):
        return rays, rays.origins
    chosen = _spread(rays.origins + starts[:, None] * rays.directions)
    rays, starts, ends, before = _some(rays, chosen), starts[chosen], ends[chosen], before[chosen]
    # from the middle of the sample before on
    edges = torch.linspace(-0.5, 1, _FINE + 1, device=starts.device)
    edges = starts[:, None] + (ends - starts)[:, None] * edges
    ray = torch.arange(len(starts), device=starts.device).repeat_interleave(_FINE)
    pieces = RaySamples(ray, edges[:, :-1].reshape(-1), edges[:, 1:].reshape(-1), len(starts))
    hit, index, _ = _crossings(scene, rays, pieces, before, 0.0)
    depth = ends.index_copy(0, hit, 0.5 * (pieces.t_starts + pieces.t_ends)[index])
    return rays, rays.origins + depth[:, None] * rays.directions


def _crossings(
    scene: Scene, rays: RayBundle, samples: RaySamples, begun: Tensor, alpha_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the sample of each ray in which half of its light is gone, if `begun` [N] optical depth lies before them.

    Samples less opaque than the threshold are empty, as in images. Returns the rays that have one [H], which it is
    [H], and the optical depth up to the middle of the one before [H].
    """
    parts = [scene.density(*points_of(rays, piece)) for piece in samples.split(AT_ONCE)]
    density = require_finite(torch.cat(parts)) if parts else samples.t_starts
    density = density * is_visible(density, samples, alpha_threshold)
    # on the CPU: not every device has numbers precise enough for sums over all rays
    ray, begun = samples.ray_indices.cpu(), begun.cpu()
    starts, ends = samples.t_starts.cpu(), samples.t_ends.cpu()
    thick = density.cpu().double() * (ends - starts)
    own = torch.zeros(samples.n_rays, dtype=thick.dtype).index_add_(0, ray, thick)
    after = begun[ray] + thick.cumsum(0) - (own.cumsum(0) - own)[ray]
    crosses = (after > _HALF).nonzero()[:, 0]
    first = torch.full_like(own, len(ray), dtype=torch.int64).scatter_reduce_(0, ray[crosses], crosses, "amin")
    hit = (first < len(ray)).nonzero()[:, 0]
    index = first[hit]
    last = (index - 1).clamp_min(0)
    joins = (ray[last] == ray[index]) & (starts[index] - ends[last] < 1e-5) & (last < index)
    before = after[index] - thick[index] - torch.where(joins, thick[last] / 2, 0.0)
    return hit.to(scene.device), index.to(scene.device), before.float().to(scene.device)


def _some(rays: RayBundle, index: Tensor) -> RayBundle:
    return RayBundle(rays.origins[index], rays.directions[index], rays.times[index], (1, 1, 1, len(index)))


def _spread(points: Tensor) -> Tensor:
    """Return which of the points [S, 3] to keep: one in each cell of a lattice."""
    low, high = points.amin(0), points.amax(0)
    cell = ((high - low).max() / _CELLS).clamp_min(1e-9)
    _, of = torch.unique(((points - low) / cell).floor(), dim=0, return_inverse=True)
    index = torch.arange(len(points), device=points.device)
    return torch.full((int(of.max()) + 1,), len(points), device=points.device).scatter_reduce(0, of, index, "amin")


def _near_pairs(points: Tensor) -> Tensor:
    """Return the pairs [E, 2] of each point and its nearest others, each pair once."""
    n = min(_NEIGHBOURS, len(points) - 1)
    if n < 1:
        return torch.zeros(0, 2, dtype=torch.int64, device=points.device)
    apart = torch.cdist(points, points).fill_diagonal_(torch.inf)
    nearest = apart.topk(n, largest=False).indices
    own = torch.arange(len(points), device=points.device)[:, None].expand_as(nearest)
    return torch.unique(torch.stack((own, nearest), -1).view(-1, 2).sort(-1).values, dim=0)


@torch.no_grad()
def _flicker(scene: Scene, motion: SurfaceMotion, rests: Tensor, on_progress: Callable[[float], None]) -> float | None:
    """Look along the rays of the points that rest [V] at each moment; see MotionReadout.flicker.

    A moment at which something else has come in front of a point doesn't count.
    """
    looked_at = rests.nonzero()[:, 0]
    looked_at = looked_at[:: -(-len(looked_at) // _RESTING) or 1]
    n, n_times = len(looked_at), len(motion.times)
    if not n:
        return None
    origins, directions = motion.origins[looked_at], motion.directions[looked_at]
    times = motion.times.to(origins).repeat_interleave(n)
    rays = RayBundle(origins.repeat(n_times, 1), directions.repeat(n_times, 1), times, (1, 1, 1, n * n_times))
    cameras, parts = silhouette_cameras(scene, 0.0, n_views=1), []
    for number, index in enumerate(torch.arange(n * n_times, device=scene.device).split(_RAYS_AT_ONCE), 1):
        output = render_view(scene, View(cameras, RenderOptions(), _some(rays, index), None, None))
        distance = output.depth / output.opacity.clamp_min(1e-6)
        parts.append(torch.cat((require_finite(output.rgb), distance), -1).view(-1, 4))
        on_progress(min(1.0, number * _RAYS_AT_ONCE / (n * n_times)))
    colors, distances = torch.cat(parts).view(n_times, n, 4).split((3, 1), -1)
    there = (distances > distances[0] - 2 * MOVES * motion.size)[..., 0]
    both = there[1:] & there[:-1]
    change = colors.diff(dim=0).abs().mean(-1)[both]
    return float(change.mean()) if len(change) else None
