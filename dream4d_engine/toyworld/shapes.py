"""The shapes, as signed distance functions in the canonical frame (the object at time 0), and their paint.

Every object stands at the origin, z up, its face towards +x. All distances are exact outside the object, so sphere
tracing never steps through a surface (Hart 1996, "Sphere tracing").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MARK_COLOR = (0.04, 0.04, 0.05)
"""The one dark, round mark on the front, by which a face is known."""

LIGHT = (0.50, 0.35, 0.80)
"""Where the baked light comes from, in the canonical frame (not normalised)."""

SNOWMAN_NECK = 0.181
"""Height of the circle where the snowman's two balls meet; what is above it is the head."""


@dataclass(frozen=True)
class Shape:
    """One shape.

    Args:
        distance: [..., 3] points to [...] signed distances.
        bound: radius of a sphere about the origin that holds the shape.
        z_bottom: its lowest height.
        mark: centre of the mark, on the surface. mark_radius: points nearer to the centre than this are dark.
    """

    distance: Callable[[Tensor], Tensor]
    bound: float
    z_bottom: float
    mark: tuple[float, float, float]
    mark_radius: float


def _length(first: Tensor, *others: Tensor) -> Tensor:
    return sum((part * part for part in others), first * first).sqrt()


def _ball(points: Tensor, radius: float, height: float = 0.0) -> Tensor:
    x, y, z = points.unbind(-1)
    return _length(x, y, z - height) - radius


def _box_2d(a: Tensor, b: Tensor) -> Tensor:
    """Distance to the quadrant a <= 0, b <= 0."""
    return _length(a.clamp(min=0), b.clamp(min=0)) + torch.maximum(a, b).clamp(max=0)


def _cube(points: Tensor, half: float = 0.45) -> Tensor:
    outside = points.abs() - half
    x, y, z = outside.clamp(min=0).unbind(-1)
    return _length(x, y, z) + outside.amax(-1).clamp(max=0)


def _cylinder(points: Tensor, radius: float = 0.41, half: float = 0.55) -> Tensor:
    x, y, z = points.unbind(-1)
    return _box_2d(_length(x, y) - radius, z.abs() - half)


def _cone(points: Tensor, radius: float = 0.54, bottom: float = -0.50, top: float = 0.62) -> Tensor:
    """A cone on its base: a triangle (axis, base, slant) in the half plane (distance from the axis, height)."""
    x, y, z = points.unbind(-1)
    r = _length(x, y)
    height = top - bottom
    # along: 0 at the tip, 1 at the rim; the nearest point of the slant is (along * radius, top - along * height)
    along = ((r * radius + (top - z) * height) / (radius**2 + height**2)).clamp(0, 1)
    slant = _length(r - along * radius, z - top + along * height)
    base = _length((r - radius).clamp(min=0), z - bottom)
    inside = (z > bottom) & (r * height < (top - z) * radius)
    return torch.minimum(slant, base) * torch.where(inside, -1.0, 1.0)


def _torus(points: Tensor, ring: float = 0.40, tube: float = 0.17) -> Tensor:
    """A standing ring: its axis is x, so the front looks through the hole."""
    x, y, z = points.unbind(-1)
    return _length(_length(y, z) - ring, x) - tube


def _snowman(points: Tensor) -> Tensor:
    return torch.minimum(_ball(points, 0.42, -0.17), _ball(points, 0.28, 0.34))


SHAPE_MODELS: dict[str, Shape] = {
    "sphere": Shape(
        lambda points: _ball(points, 0.56),
        0.56,
        -0.56,
        (0.56 * math.cos(0.35), 0.0, 0.56 * math.sin(0.35)),
        0.21,
    ),
    "cube": Shape(_cube, 0.45 * math.sqrt(3), -0.45, (0.45, 0.0, 0.10), 0.21),
    "cone": Shape(_cone, 0.74, -0.50, (0.54 * 0.67 / 1.12, 0.0, -0.05), 0.20),
    "cylinder": Shape(_cylinder, 0.69, -0.55, (0.41, 0.0, 0.15), 0.21),
    "torus": Shape(_torus, 0.57, -0.57, (0.17, 0.0, 0.40), 0.20),
    "snowman": Shape(_snowman, 0.62, -0.59, (0.28 * math.cos(0.15), 0.0, 0.34 + 0.28 * math.sin(0.15)), 0.17),
}
"""In the order of captions.SHAPES."""


def surface_normals(shape: Shape, points: Tensor, step: float = 1e-3) -> Tensor:
    """Return [S, 3] unit normals by differences of the distance at the four corners of a small tetrahedron."""
    corners = points.new_tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    normals = sum(corner * shape.distance(points + step * corner)[..., None] for corner in corners)
    return torch.nn.functional.normalize(normals, dim=-1)


def is_marked(shape: Shape, points: Tensor, azimuths_deg: Sequence[float] = (0.0,)) -> Tensor:
    """Return [S] whether surface points are dark; the mark is repeated at each azimuth about the vertical axis."""
    marked = torch.zeros(points.shape[:-1], dtype=torch.bool, device=points.device)
    mx, my, mz = shape.mark
    for azimuth in azimuths_deg:
        c, s = math.cos(math.radians(azimuth)), math.sin(math.radians(azimuth))
        center = points.new_tensor([c * mx - s * my, s * mx + c * my, mz])
        front = points[..., 0] * c + points[..., 1] * s > 0
        marked |= front & ((points - center).square().sum(-1) < shape.mark_radius**2)
    return marked


def paint(
    shape: Shape,
    points: Tensor,
    color: Tensor,
    head_color: Tensor | None = None,
    mark_azimuths_deg: Sequence[float] = (0.0,),
) -> Tensor:
    """Return [S, 3] colours of surface points: the object's colour times a baked light (0.7 to 1), or the mark.

    The light belongs to the canonical frame, so a shade moves with its piece of surface and looks the same from
    everywhere: a field without view dependence can hold it exactly.

    Args:
        points: [S, 3] canonical. color: [S, 3]. head_color: [S, 3], above the snowman's neck.
    """
    light = torch.nn.functional.normalize(points.new_tensor(LIGHT), dim=0)
    shade = 0.85 + 0.15 * (surface_normals(shape, points) @ light)
    if head_color is not None:
        color = torch.where(points[..., 2:] > SNOWMAN_NECK, head_color, color)
    dark = is_marked(shape, points, mark_azimuths_deg)
    return torch.where(dark[:, None], points.new_tensor(MARK_COLOR), shade[:, None] * color)
