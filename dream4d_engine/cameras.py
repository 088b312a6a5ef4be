"""Cameras in groups, and the one place that states the coordinate convention.

World: right-handed, z up, the object in the box [-1, 1]^3. Azimuth 0 is the front, the camera on +x, growing
towards +y; elevation grows upwards. A camera sits at
`distance * (cos e cos a, cos e sin a, sin e)` and looks at the origin. The columns of `c2w` are right, up,
backward (an OpenGL camera: it looks down its own -z) and position. Angles are in radians; names that end in
`_deg` are in degrees and appear only where people write numbers down.

A *relative* distance r means r / tan(fov_y / 2): the object keeps its size in the image whatever the field of
view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from .randomness import Source, draw_rows
from .transfers import send

ElevationLaw = Literal["mixed", "uniform", "sphere"]
Orbit = Literal["static", "dynamic"]
"""Once around, evenly spaced at one elevation; or with an elevation that rises or falls on the way, and jitter."""


@dataclass(frozen=True)
class CameraBatch:
    """B groups of F cameras: F views of one moment, F moments of one take, or F = 1 for single images."""

    c2w: Tensor  # [B, F, 4, 4] camera-to-world matrices
    fov_y: Tensor  # [B, F] vertical fields of view, radians
    azimuth: Tensor  # [B, F], radians
    elevation: Tensor  # [B, F], radians
    distance: Tensor  # [B, F], world units from the origin
    time: Tensor  # [B, F], animation moments in [0, 1]
    height: int  # of the images, pixels
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """(B, F)."""
        return self.azimuth.shape[0], self.azimuth.shape[1]

    def apparent_area(self) -> float:
        """How much of an image a thing at the origin takes: mean over the cameras of 1 / (distance tan(fov_y / 2))^2.

        In units of a factor that depends on the thing. Waits for a GPU that the cameras are on.
        """
        return float((self.position.norm(dim=-1) * torch.tan(self.fov_y / 2)).clamp_min(1e-3).pow(-2).mean())

    @property
    def position(self) -> Tensor:
        """[B, F, 3] camera centres."""
        return self.c2w[..., :3, 3]

    def _map(self, change) -> CameraBatch:
        tensors = {f.name: change(getattr(self, f.name)) for f in fields(self) if f.name not in ("height", "width")}
        return replace(self, **tensors)

    def to(self, device: torch.device | str) -> CameraBatch:
        """The same cameras on another device."""
        return self._map(lambda tensor: send(tensor, device))

    def resized(self, height: int, width: int) -> CameraBatch:
        """The same cameras with images of another size (same vertical field of view)."""
        return replace(self, height=height, width=width)

    def reshape(self, n_groups: int, n_frames: int) -> CameraBatch:
        """The same cameras, in the same order, grouped as [n_groups, n_frames]."""
        return self._map(lambda tensor: tensor.reshape(n_groups, n_frames, *tensor.shape[2:]))

    def frames(self, start: int, stop: int) -> CameraBatch:
        """The frames start..stop-1 of every group."""
        return self._map(lambda tensor: tensor[:, start:stop])

    def windows(self, starts: Sequence[int], n_frames: int) -> CameraBatch:
        """So many frames from each start on as groups of their own, [B * n, n_frames]; those of a group together."""
        return self._map(lambda tensor: torch.stack([tensor[:, s : s + n_frames] for s in starts], 1).flatten(0, 1))

    def groups(self, index: Tensor | slice) -> CameraBatch:
        """The groups that `index` (a slice, bool or int64 over B) picks."""
        return self._map(lambda tensor: tensor[index])

    def at_time(self, time: float | Tensor) -> CameraBatch:
        """The same cameras at other moments; `time` broadcasts to [B, F]."""
        moments = torch.as_tensor(time, dtype=self.time.dtype, device=self.time.device)
        return replace(self, time=moments.expand(self.shape).clone())


def look_at_origin(azimuth: Tensor, elevation: Tensor, distance: Tensor) -> Tensor:
    """Return camera-to-world matrices [..., 4, 4] of cameras that look at the origin with z up."""
    sin_a, cos_a = torch.sin(azimuth), torch.cos(azimuth)
    sin_e, cos_e = torch.sin(elevation), torch.cos(elevation)
    zero = torch.zeros_like(sin_a)
    # not a cross product with z, which is 0 straight above: at 90 degrees this is the limit from below
    right = torch.stack((-sin_a, cos_a, zero), -1)
    backward = torch.stack((cos_e * cos_a, cos_e * sin_a, sin_e), -1)
    up = torch.stack((-sin_e * cos_a, -sin_e * sin_a, cos_e), -1)
    c2w = torch.zeros(*azimuth.shape, 4, 4, dtype=azimuth.dtype, device=azimuth.device)
    c2w[..., :3, 0], c2w[..., :3, 1], c2w[..., :3, 2] = right, up, backward
    c2w[..., :3, 3] = backward * distance[..., None]
    c2w[..., 3, 3] = 1.0
    return c2w


def make_cameras(
    azimuth: Tensor | float,
    elevation: Tensor | float,
    distance: Tensor | float,
    fov_y: Tensor | float,
    time: Tensor | float,
    height: int,
    width: int,
) -> CameraBatch:
    """Build a CameraBatch from values in radians and world units that broadcast to [B, F]."""
    if height < 1 or width < 1:
        raise ValueError(f"images need at least one pixel, got {width}x{height}")
    values = [torch.as_tensor(v, dtype=torch.float32) for v in (azimuth, elevation, distance, fov_y, time)]
    # [1, 1] makes all of them [B, F]; a broadcast tensor's entries share memory, a copy's don't
    values = [v.clone() for v in torch.broadcast_tensors(*values, torch.zeros(1, 1))[:5]]
    if values[0].ndim != 2:
        raise ValueError(f"camera values must broadcast to [B, F], got shape {tuple(values[0].shape)}")
    azimuth, elevation, distance, fov_y, time = values
    return CameraBatch(
        look_at_origin(azimuth, elevation, distance), fov_y, azimuth, elevation, distance, time, height, width
    )


@dataclass(frozen=True)
class CameraRanges:
    """The distribution that training cameras are drawn from: lowest and highest of each, uniform between them."""

    azimuth_deg: tuple[float, float] = (-180.0, 180.0)  # 0 is the front
    elevation_deg: tuple[float, float] = (0.0, 30.0)
    fov_y_deg: tuple[float, float] = (15.0, 60.0)  # vertical
    distance: tuple[float, float] = (0.8, 1.0)
    relative_distance: bool = True  # r means r / tan(fov_y / 2): the object keeps its size in the image
    # sphere: uniform on the sphere's surface; mixed: uniform in degrees or that, drawn for each group
    elevation_law: ElevationLaw = "mixed"
    gather: float = 0.0  # of azimuths in the range's middle: middle + half * sign(u) |u|^(1 + gather), u uniform

    def __post_init__(self) -> None:
        for name in ("azimuth_deg", "elevation_deg", "fov_y_deg", "distance"):
            low, high = getattr(self, name)
            if not low <= high:
                raise ValueError(f"{name} needs its lower bound first, got {low} > {high}")
        if not (-90 <= self.elevation_deg[0] and self.elevation_deg[1] <= 90):
            raise ValueError(f"elevation_deg must lie in [-90, 90], got {self.elevation_deg}")
        if not (0 < self.fov_y_deg[0] and self.fov_y_deg[1] < 180):
            raise ValueError(f"fov_y_deg must lie in (0, 180), got {self.fov_y_deg}")
        if not 0 <= self.gather <= 10:
            raise ValueError(f"gather must lie in [0, 10], got {self.gather}")
        if self.distance[0] <= 0:
            raise ValueError(f"distance must be positive, got {self.distance}")


def _uniform(bounds: tuple[float, float], n: int, source: Source) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * draw_rows(torch.rand, (n,), source)


def _azimuths(ranges: CameraRanges, n: int, source: Source) -> Tensor:
    """Degrees [n]."""
    low, high = ranges.azimuth_deg
    azimuth = _uniform((low, high), n, source)
    if not ranges.gather or low == high:
        return azimuth
    middle, half = (low + high) / 2, (high - low) / 2
    aside = (azimuth - middle) / half
    return middle + half * aside.sign() * aside.abs() ** (1 + ranges.gather)


def _sample_pose(ranges: CameraRanges, n: int, source: Source) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (azimuth, elevation, distance, fov_y), each [n, 1]."""
    azimuth = torch.deg2rad(_azimuths(ranges, n, source))
    low, high = (math.radians(e) for e in ranges.elevation_deg)
    # all laws are drawn, so that the other numbers don't depend on which one it is
    uniform = _uniform((low, high), n, source)
    sphere = torch.asin(_uniform((math.sin(low), math.sin(high)), n, source).clamp(-1, 1))  # equal areas: uniform in z
    coin = draw_rows(torch.rand, (n,), source) < 0.5
    laws = {"uniform": uniform, "sphere": sphere, "mixed": torch.where(coin, uniform, sphere)}
    elevation = laws[ranges.elevation_law]
    fov_y = torch.deg2rad(_uniform(ranges.fov_y_deg, n, source))
    distance = _uniform(ranges.distance, n, source)
    if ranges.relative_distance:
        distance = distance / torch.tan(fov_y / 2)
    return azimuth[:, None], elevation[:, None], distance[:, None], fov_y[:, None]


def sample_views(
    ranges: CameraRanges, n_groups: int, n_views: int, height: int, width: int, source: Source
) -> CameraBatch:
    """Draw groups of views evenly spaced in azimuth from a random start, all else common to a group.

    With `n_views` = 1 these are independent random cameras. The time is 0.
    """
    azimuth, elevation, distance, fov_y = _sample_pose(ranges, n_groups, source)
    azimuth = azimuth + torch.arange(n_views) * (2 * math.pi / n_views)
    azimuth = torch.remainder(azimuth + math.pi, 2 * math.pi) - math.pi  # in [-pi, pi)
    return make_cameras(azimuth, elevation, distance, fov_y, 0.0, height, width)


ORBIT_WAVES, ORBIT_JITTER = 2, 0.25
"""Of a dynamic orbit: how often its elevation may come and go; how far azimuths are off, in parts of a step."""


def sample_orbits(
    ranges: CameraRanges,
    orbit: Orbit,
    end: tuple[float, float],
    n_groups: int,
    n_views: int,
    height: int,
    width: int,
    source: Source,
) -> CameraBatch:
    """Draw groups of views once around the object, in order, whose last one is seen from `end`. The time is 0.

    A static orbit has azimuths evenly spaced and the elevation of its end; a dynamic one has azimuths with jitter, and
    its elevation goes to one of the ranges' and comes back, once or twice (SV3D 2403.12008, section 3).

    Args:
        end: (azimuth, elevation), radians. ranges: of elevation, field of view and distance; azimuths are not read.
    """
    _, far, distance, fov_y = _sample_pose(ranges, n_groups, source)
    waves = 1 + (draw_rows(torch.rand, (n_groups,), source) * ORBIT_WAVES).floor()[:, None]
    jitter = ORBIT_JITTER * (2 * draw_rows(torch.rand, (n_groups, n_views), source) - 1)
    place = torch.arange(1, n_views + 1).expand(n_groups, -1)
    elevation = torch.full((n_groups, n_views), end[1])
    if orbit == "dynamic":
        elevation = elevation + (far - end[1]) * torch.sin(math.pi * waves * place / n_views) ** 2
        place = place + torch.where(place < n_views, jitter, 0.0)
    azimuth = end[0] + 2 * math.pi * place / n_views
    return make_cameras(azimuth, elevation, distance, fov_y, 0.0, height, width)


def film_times(n_frames: int, loop: bool = False, device: torch.device | str | None = None) -> Tensor:
    """The moments [n_frames] of a film of the whole animation: 0 to 1, of a loop without the 1, which is 0 again."""
    if loop:
        return torch.arange(n_frames, device=device) / n_frames
    return torch.linspace(0, 1, n_frames, device=device)


def sample_takes(
    ranges: CameraRanges,
    n_groups: int,
    n_frames: int,
    height: int,
    width: int,
    source: Source,
    time_span: tuple[float, float] = (0.8, 1.0),
    starts: tuple[float, float] | None = None,
) -> CameraBatch:
    """Draw fixed cameras that film the animation: frames over an interval of random length inside [0, 1].

    `starts`: of a loop, between which moments a take begins; it goes on past 1, where 0 follows.
    """
    azimuth, elevation, distance, fov_y = _sample_pose(ranges, n_groups, source)
    length = _uniform(time_span, n_groups, source)
    place = draw_rows(torch.rand, (n_groups,), source)
    # so that it ends within the animation; a loop has no end
    start = place * (1 - length) if starts is None else starts[0] + (starts[1] - starts[0]) * place
    time = start[:, None] + length[:, None] * torch.linspace(0, 1, n_frames)
    time = time.clamp(0, 1) if starts is None else time.remainder(1)
    return make_cameras(azimuth, elevation, distance, fov_y, time, height, width)


def orbit(
    n_frames: int,
    height: int,
    width: int,
    elevation_deg: float = 15.0,
    distance: float = 3.0,
    fov_y_deg: float = 40.0,
    time: Tensor | float = 0.0,
    start_deg: float = 0.0,
) -> CameraBatch:
    """One group of cameras evenly spaced over a full turn, [1, n_frames]; `time` broadcasts over the frames."""
    azimuth = math.radians(start_deg) + torch.arange(n_frames) * (2 * math.pi / n_frames)
    return make_cameras(
        azimuth[None], math.radians(elevation_deg), distance, math.radians(fov_y_deg), time, height, width
    )


def fixed_take(
    n_frames: int,
    height: int,
    width: int,
    azimuth_deg: float = 0.0,
    elevation_deg: float = 15.0,
    distance: float = 3.0,
    fov_y_deg: float = 40.0,
    loop: bool = False,
) -> CameraBatch:
    """One still camera that films the whole animation, [1, n_frames] at `film_times`."""
    return make_cameras(
        math.radians(azimuth_deg),
        math.radians(elevation_deg),
        distance,
        math.radians(fov_y_deg),
        film_times(n_frames, loop)[None],
        height,
        width,
    )


def final_path(
    height: int,
    width: int,
    n_parts: int = 8,
    frames_per_part: int = 24,
    elevation_deg: float = 15.0,
    distance: float = 3.0,
    fov_y_deg: float = 40.0,
    loop: bool = False,
) -> CameraBatch:
    """The path of the final video: each part plays the animation once, at `film_times`.

    Even parts hold the camera still; odd parts orbit to the place of the next one. All parts together are one
    full turn. Returns [1, n_parts * frames_per_part].
    """
    if n_parts < 2 or n_parts % 2:
        raise ValueError(f"the final path alternates still and orbiting parts: n_parts must be even, got {n_parts}")
    turn = 2 * math.pi / (n_parts // 2)
    progress = film_times(frames_per_part, loop)
    azimuth = [turn * (part // 2) + (part % 2) * turn * progress for part in range(n_parts)]
    return make_cameras(
        torch.cat(azimuth)[None],
        math.radians(elevation_deg),
        distance,
        math.radians(fov_y_deg),
        progress.repeat(n_parts)[None],
        height,
        width,
    )
