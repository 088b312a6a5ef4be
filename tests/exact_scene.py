"""Scenes whose field is known in closed form: what a surface and its way must come out as can be written down."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dream4d_engine.fields.deformation import DeformationConfig
from dream4d_engine.fields.encodings import HashGridConfig
from dream4d_engine.fields.radiance import RadianceConfig
from dream4d_engine.scene import Scene, SceneConfig, build_scene
from dream4d_engine.toyworld.shapes import SHAPE_MODELS

GRID = HashGridConfig(n_levels=2, log2_entries=6, base_resolution=2, growth=2.0)
DENSEST = 60.0
TOP, BOTTOM = (0.9, 0.2, 0.1), (0.1, 0.3, 0.8)


class ExactField(nn.Module):
    """A solid with a soft skin: density DENSEST / (1 + exp(distance / softness)), red above and blue below."""

    def __init__(self, distance: Callable[[Tensor], Tensor], radius: float, softness: float = 0.004) -> None:
        super().__init__()
        self.distance, self.radius, self.softness = distance, radius, softness
        self.grid = nn.Module()
        self.grid.table = nn.Parameter(torch.zeros(1))  # a scene is where this is

    def density(self, u: Tensor, kernels: object) -> Tensor:
        points = (2 * u - 1) * self.radius
        return DENSEST * torch.sigmoid(-self.distance(points) / self.softness)

    def forward(self, u: Tensor, kernels: object) -> tuple[Tensor, Tensor]:
        above = u[:, 2:] > 0.5
        return self.density(u, kernels), torch.where(above, u.new_tensor(TOP), u.new_tensor(BOTTOM))


class ExactMotion(nn.Module):
    """A backward warp in the world's frame: (places [S, 3], times [S]) -> where each comes from."""

    def __init__(self, came_from: Callable[[Tensor, Tensor], Tensor], radius: float, scale: float) -> None:
        super().__init__()
        self.came_from, self.radius = came_from, radius
        self.config = DeformationConfig(GRID, scale=scale)

    def displacement(self, u: Tensor, times: Tensor, kernels: object) -> Tensor:
        canonical = (self.came_from((2 * u - 1) * self.radius, times) / self.radius + 1) / 2
        return (canonical - 0.5) * self.config.scale + 0.5 - u

    def warp(self, u: Tensor, displacement: Tensor) -> Tensor:
        return ((u + displacement - 0.5) / self.config.scale + 0.5).clamp(0, 1)


def exact_scene(
    distance: Callable[[Tensor], Tensor] | str,
    came_from: Callable[[Tensor, Tensor], Tensor] | None = None,
    radius: float = 1.0,
    scale: float = 1.0,
) -> Scene:
    """A scene of one solid (a shape of the toy world, or a signed distance), which perhaps moves."""
    if isinstance(distance, str):
        distance = SHAPE_MODELS[distance].distance
    radiance = RadianceConfig(GRID, hidden_width=4)
    config = SceneConfig(radius=radius, radiance=radiance, occupancy_resolution=16, n_samples=128)
    scene = build_scene(config, torch.Generator().manual_seed(0))
    scene.canonical = ExactField(distance, radius)
    if came_from is not None:
        scene.deformation = ExactMotion(came_from, radius, scale)
    scene.refresh_occupancy()
    return scene.requires_grad_(False)


def jump(points: Tensor, times: Tensor, sign: float = 1.0) -> Tensor:
    """The inverse of z += 0.3 sin(pi t)."""
    up = 0.3 * torch.sin(math.pi * times)
    return points - sign * torch.stack((up * 0, up * 0, up), -1)


def sway(points: Tensor, times: Tensor) -> Tensor:
    """The inverse of y += 0.4 (z + 0.5) sin(2 pi t)."""
    lean = 0.4 * (points[:, 2] + 0.5) * torch.sin(2 * math.pi * times)
    return points - torch.stack((lean * 0, lean, lean * 0), -1)


def stretch(points: Tensor, times: Tensor) -> Tensor:
    """The inverse of a height times s = 1 + 0.4 sin(2 pi t), and widths that keep the volume."""
    tall = 1 + 0.4 * torch.sin(2 * math.pi * times)
    return points * torch.stack((tall.sqrt(), tall.sqrt(), 1 / tall), -1)


def turn(points: Tensor, times: Tensor) -> Tensor:
    """The inverse of a turn by 50 degrees * sin(2 pi t)."""
    angle = math.radians(50) * torch.sin(2 * math.pi * times)
    x, y, z = points.unbind(-1)
    return torch.stack((angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x, z), -1)
