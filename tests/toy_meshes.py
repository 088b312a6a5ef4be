"""The toy world's objects as meshes on the true surfaces, painted as the world is; where they are later; and a soup."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from dream4d_engine.mesh import Mesh
from dream4d_engine.meshes import Material, Model, Source
from dream4d_engine.toyworld.captions import COLORS, MOTIONS, SHAPES, Caption, as_caption
from dream4d_engine.toyworld.motions import world_from_canonical
from dream4d_engine.toyworld.shapes import SHAPE_MODELS, paint

ROUND, ALONG = 96, 24


def toy_model(caption: Caption | str) -> Model:
    """The caption's object as a mesh, z up and the front towards +x."""
    caption = as_caption(caption)
    vertices, faces = _cube() if caption.shape == "cube" else _turned(caption.shape)
    color = torch.tensor(COLORS[caption.color]).expand(len(vertices), 3)
    painted = paint(SHAPE_MODELS[caption.shape], vertices, color).clamp(0, 1)
    return model_of(vertices, faces, painted, caption.object_text)


def model_of(vertices: Tensor, faces: Tensor, colors: Tensor, name: str) -> Model:
    """A mesh with colours [V, 3] at its vertices as a model."""
    material = torch.zeros(len(faces), dtype=torch.int64)
    return Model(Mesh(vertices, faces, colors=colors), (Material(),), material, Source(name, "tensors", ""))


def true_tracks(caption: Caption | str, vertices: Tensor, times: Tensor) -> Tensor:
    """Where vertices [V, 3] of the caption's object are at times [T], [T, V, 3]."""
    caption = as_caption(caption)
    motion, shape = (torch.full((len(times),), i) for i in (MOTIONS.index(caption.motion), SHAPES.index(caption.shape)))
    affine = world_from_canonical(motion, shape, times)
    return vertices @ affine[:, :3, :3].mT + affine[:, None, :3, 3]


def _grid(rows: int, columns: int) -> Tensor:
    """Faces over rows x columns vertices, which run counter-clockwise where columns turn left and rows go down."""
    at = torch.arange(rows * columns).view(rows, columns)
    a, b, c, d = at[:-1, :-1], at[1:, :-1], at[1:, 1:], at[:-1, 1:]
    return torch.cat((torch.stack((a, b, c), -1).reshape(-1, 3), torch.stack((a, c, d), -1).reshape(-1, 3)))


def _cube(half: float = 0.45, n: int = 25) -> tuple[Tensor, Tensor]:
    ticks = torch.linspace(-half, half, n)
    sides, faces = [], []
    for axis in range(3):
        for sign in (1.0, -1.0):
            u, v = torch.meshgrid(ticks, ticks, indexing="ij")
            corners = [torch.full_like(u, sign * half), u, v] if sign > 0 else [torch.full_like(u, sign * half), v, u]
            side = torch.stack(corners, -1).reshape(-1, 3).roll(axis, -1)
            faces.append(_grid(n, n) + len(sides) * n * n)
            sides.append(side)
    return torch.cat(sides), torch.cat(faces)


def _turned(shape: str) -> tuple[Tensor, Tensor]:
    """A profile (radius, height) from above turned about z; the ring's about x."""
    down = torch.linspace(0, math.pi, 2 * ALONG)
    straight = torch.linspace(0, 1, ALONG)
    if shape == "sphere":
        profile = 0.56 * torch.stack((down.sin(), down.cos()), -1)
    elif shape == "cylinder":
        profile = _along(straight, (0, 0.55), (0.41, 0.55), (0.41, -0.55), (0, -0.55))
    elif shape == "cone":
        profile = _along(straight, (0, 0.62), (0.54, -0.50), (0, -0.50))
    elif shape == "snowman":
        neck = 0.181
        above, below = math.acos((neck - 0.34) / 0.28), math.acos((neck + 0.17) / 0.42)
        head, body = torch.linspace(0, above, 2 * ALONG), torch.linspace(below, math.pi, 2 * ALONG)
        profile = torch.cat(
            (
                torch.stack((0.28 * head.sin(), 0.34 + 0.28 * head.cos()), -1),
                torch.stack((0.42 * body.sin(), -0.17 + 0.42 * body.cos()), -1),
            )
        )
    elif shape == "torus":
        turn = torch.linspace(0, 2 * math.pi, 2 * ALONG)
        profile = torch.stack((0.40 + 0.17 * turn.sin(), 0.17 * turn.cos()), -1)
    else:
        raise ValueError(f"no mesh of {shape!r} is known")
    angle = torch.linspace(0, 2 * math.pi, ROUND)
    radius, height = profile.unbind(-1)
    points = torch.stack(
        (radius[:, None] * angle.cos(), radius[:, None] * angle.sin(), height[:, None].expand(-1, ROUND)), -1
    ).reshape(-1, 3)
    return points.roll(1, -1) if shape == "torus" else points, _grid(len(profile), ROUND)


def _along(straight: Tensor, *corners: tuple[float, float]) -> Tensor:
    places = torch.tensor(corners, dtype=torch.float32)
    return torch.cat([torch.lerp(a, b, straight[:, None]) for a, b in pairwise(places)])


def soup() -> Model:
    """An armoured figure of open, layered, overlapping shells: sleeves without ends, plates of no thickness over them,
    layers within that nobody sees, a cape that is one sheet, a thin blade."""
    generator = torch.Generator().manual_seed(0)
    parts: list[tuple[Tensor, tuple[float, float, float]]] = []

    def patch(
        radius: float, low: float, high: float, first: float, last: float, at: tuple[float, float, float]
    ) -> Tensor:
        """A piece of an upright sleeve between two heights and two angles, [n, n, 3]."""
        z, angle = torch.meshgrid(torch.linspace(high, low, 13), torch.linspace(first, last, 13), indexing="ij")
        return torch.stack((radius * angle.cos(), radius * angle.sin(), z), -1) + torch.tensor(at)

    turn, steel, cloth = 2 * math.pi, (0.62, 0.64, 0.7), (0.7, 0.12, 0.14)
    for radius, color in ((0.2, steel), (0.17, (0.3, 0.2, 0.1)), (0.12, cloth)):  # the trunk, and layers within
        parts.append((patch(radius, -0.1, 0.4, 0, turn, (0, 0, 0)), color))
    for side in (-1.0, 1.0):
        parts.append((patch(0.07, -0.6, -0.08, 0, turn, (0, 0.1 * side, 0)), (0.25, 0.27, 0.4)))  # legs
        parts.append((patch(0.055, -0.15, 0.36, 0, turn, (0, 0.28 * side, 0)), steel))  # arms
        for height in (0.22, 0.28, 0.34):  # plates on the shoulders
            parts.append((patch(0.09, height, height + 0.09, 0, turn, (0, 0.27 * side, 0)), (0.75, 0.6, 0.2)))
    parts.append((patch(0.12, 0.42, 0.66, 0, turn, (0, 0, 0)), steel))  # the helmet, open above and below
    parts.append((patch(0.09, 0.44, 0.64, 0, turn, (0, 0, 0)), (0.85, 0.65, 0.5)))
    for _ in range(12):  # plates all over the trunk
        low, first = (torch.rand(2, generator=generator) * torch.tensor([0.35, turn])).tolist()
        parts.append((patch(0.215, low - 0.08, low + 0.08, first, first + 0.9, (0, 0, 0)), (0.5, 0.52, 0.6)))
    parts.append((patch(0.3, -0.5, 0.38, 0.75 * math.pi, 1.25 * math.pi, (0.04, 0, 0)), cloth))  # the cape
    blade = patch(1.0, -0.3, 0.6, 0, 0.02, (-0.9, 0.38, 0))
    parts.append((blade, (0.9, 0.9, 0.95)))
    vertices = torch.cat([part.reshape(-1, 3) for part, _ in parts])
    faces = torch.cat([_grid(13, 13) + 169 * i for i in range(len(parts))])
    faces[::2] = faces[::2].flip(-1)  # half of them turned inside out
    colors = torch.cat([torch.tensor(color).expand(169, 3) for _, color in parts])
    shade = 0.75 + 0.25 * torch.rand(len(vertices), 1, generator=generator)
    return model_of(vertices, faces, colors * shade, "soup")
