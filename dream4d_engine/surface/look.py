"""How the field is asked from this room: many points at one moment, in pieces, with nothing kept for a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..mesh import MeshError
from ..scene import Scene

AT_ONCE = 2**18
"""Points queried together."""

Progress = Callable[[float], None] | None
"""Told the share done, 0 to 1; may raise to stop."""


Look = Callable[[Tensor], Tensor]
"""What of the field is asked: places [S, 3] -> values [S, ...]."""


def density_at(scene: Scene, time: float | None) -> Look:
    """The density at points of the world at a moment; None: of the canonical field, before anything moves it."""
    if time is None:
        radius = scene.config.radius
        return lambda points: scene.canonical.density(((points / radius + 1) / 2).clamp(0, 1), scene.kernels)
    return lambda points: scene.density(points, points.new_full((len(points),), time))


def looks_at(scene: Scene, time: float | None) -> Look:
    """Density and colour [S, 4] at points of the world, likewise."""

    def look(points: Tensor) -> Tensor:
        if time is None:
            u = ((points / scene.config.radius + 1) / 2).clamp(0, 1)
            density, rgb = scene.canonical(u, scene.kernels)
        else:
            found = scene.query(points, points.new_full((len(points),), time))
            density, rgb = found.density, found.rgb
        return torch.cat((density.float()[:, None], rgb.float()), -1)

    return look


def require_finite(values: Tensor) -> Tensor:
    """Return values of the field, if that is what they are."""
    if not bool(values.isfinite().all()):
        raise MeshError("the scene's field is not a finite number everywhere: it has no surface; train it anew")
    return values


@torch.no_grad()
def in_pieces(look: Look, points: Tensor, on_progress: Progress = None) -> Tensor:
    """Ask for all points [S, 3]; what is not a finite number is an error."""
    found, done = [], 0
    for piece in points.split(AT_ONCE):
        found.append(require_finite(look(piece).float()))
        done += len(piece)
        if on_progress is not None:
            on_progress(done / len(points))
    return torch.cat(found)
