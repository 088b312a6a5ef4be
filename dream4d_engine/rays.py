"""Rays and the samples on them, as flat records."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cameras import CameraBatch
from .randomness import Source, draw_rows
from .transfers import send


@dataclass(frozen=True)
class RayBundle:
    """N = B*F*H*W rays in image order."""

    origins: Tensor  # [N, 3], world units
    directions: Tensor  # [N, 3], unit length
    times: Tensor  # [N], moments in [0, 1]
    shape: tuple[int, int, int, int]  # (B, F, H, W)


@dataclass(frozen=True)
class RaySamples:
    """S intervals on N rays, sorted by ray and then by distance."""

    ray_indices: Tensor  # [S] int64, ascending
    t_starts: Tensor  # [S] distances along the unit directions
    t_ends: Tensor  # [S]
    n_rays: int  # N

    @property
    def middles(self) -> Tensor:
        """[S] distances of the intervals' middles, where the scene is queried."""
        return 0.5 * (self.t_starts + self.t_ends)

    def split(self, size: int) -> list[RaySamples]:
        """The samples in pieces of so many."""
        pieces = zip(self.ray_indices.split(size), self.t_starts.split(size), self.t_ends.split(size), strict=True)
        return [RaySamples(rays, starts, ends, self.n_rays) for rays, starts, ends in pieces]

    def select(self, keep: Tensor, n_kept: int | None = None) -> RaySamples:
        """The samples where `keep` [S] (bool) holds; where it is known how many, a GPU need not be asked."""
        found = keep.nonzero() if n_kept is None else keep.nonzero_static(size=n_kept)
        kept = found[:, 0]  # found once for all three
        rays, starts, ends = (c.index_select(0, kept) for c in (self.ray_indices, self.t_starts, self.t_ends))
        return RaySamples(rays, starts, ends, self.n_rays)


def rays_from_cameras(cameras: CameraBatch, jitter: float = 0.0, source: Source | None = None) -> RayBundle:
    """Cast one ray through every pixel's middle.

    `jitter` is the standard deviation of a normal offset on the (unnormalised) direction.
    """
    (n_groups, n_frames), height, width = cameras.shape, cameras.height, cameras.width
    device = cameras.c2w.device
    focal = 0.5 * height / torch.tan(cameras.fov_y / 2)
    i = torch.arange(width, device=device) + 0.5 - width / 2
    j = torch.arange(height, device=device) + 0.5 - height / 2
    # pixel (i, j) looks along (i / f, -j / f, -1) in its camera: rows go down, y goes up, the camera looks down -z
    x = (i / focal[..., None])[:, :, None, :].expand(-1, -1, height, -1)
    y = (-j / focal[..., None])[:, :, :, None].expand(-1, -1, -1, width)
    local = torch.stack((x, y, -torch.ones_like(x)), -1)  # [B, F, H, W, 3]
    # summed by hand: a matrix product would be rounded under autocast and with tf32, and rays with it
    rotation = cameras.c2w[:, :, None, None, :3, :3]
    directions = (rotation * local[..., None, :]).sum(-1)
    if jitter > 0:
        if source is None:
            raise ValueError("ray jitter needs a generator")
        noise = draw_rows(torch.randn, tuple(directions.shape), source, dtype=directions.dtype)
        directions = directions + jitter * send(noise, device)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    shape = (n_groups, n_frames, height, width)
    origins = cameras.position[:, :, None, None].expand(*shape, 3)
    times = cameras.time[:, :, None, None].expand(shape)
    return RayBundle(origins.reshape(-1, 3), directions.reshape(-1, 3), times.reshape(-1), shape)
