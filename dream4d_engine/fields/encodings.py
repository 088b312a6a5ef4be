"""Encodings of points (hash grids of any dimension) and of directions (spherical harmonics)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import PUBLISHED_GROWTH, GridLayout, Kernels, grid_layout


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside [low, high] (or no number at all)."""
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")


MAX_LOG2_ENTRIES = 24
"""Of a level."""


@dataclass(frozen=True)
class HashGridConfig:
    """A multiresolution hash grid (Mueller et al. 2022, 2201.05989)."""

    n_levels: int = 16  # level l has about base_resolution * growth^l cells a side
    n_features: int = 2  # numbers an entry
    log2_entries: int = 19  # of a level at most: finer ones are hashed into as many
    base_resolution: int = 16  # of the coarsest level
    growth: float = PUBLISHED_GROWTH  # from level to level

    def __post_init__(self) -> None:
        require_range("n_levels", self.n_levels, 1, 32)
        require_range("n_features", self.n_features, 1, 8)
        require_range("log2_entries", self.log2_entries, 3, MAX_LOG2_ENTRIES)
        require_range("base_resolution", self.base_resolution, 1, 1024)
        require_range("growth", self.growth, 1.0, 4.0)
        finest = math.log2(self.base_resolution) + (self.n_levels - 1) * math.log2(self.growth)
        if finest > 20:  # of fp32's 24 bits, some must be left for the place within a cell
            raise ValueError(f"the finest level would have 2^{finest:.0f} cells a side, more than fp32 can tell apart")

    def layout(self, n_dims: int) -> GridLayout:
        """Where the entries lie, for points of `n_dims` coordinates."""
        return grid_layout(n_dims, self.n_levels, self.n_features, self.log2_entries, self.base_resolution, self.growth)


class HashGrid(nn.Module):
    """The parameters of a hash grid: one flat fp32 vector in tiny-cuda-nn's layout, whatever kernel reads it."""

    def __init__(self, config: HashGridConfig, n_dims: int) -> None:
        super().__init__()
        self.layout = config.layout(n_dims)
        self.table = nn.Parameter(torch.zeros(self.layout.n_parameters))

    def reset(self, generator: torch.Generator) -> None:
        """Draw the entries from U(-1e-4, 1e-4)."""
        with torch.no_grad():
            self.table.copy_((torch.rand(self.table.shape, generator=generator) * 2 - 1) * 1e-4)

    def forward(self, x: Tensor, kernels: Kernels, n_active: int | None = None) -> Tensor:
        """[S, D] in [0, 1] -> [S, n_levels * n_features]; levels from `n_active` on give zeros."""
        return kernels.hash_encode(x, self.table, self.layout, n_active)


def spherical_harmonics(directions: Tensor) -> Tensor:
    """Return the real spherical harmonics below degree 3 of unit directions [..., 3], as [..., 9].

    Order and signs are those of tiny-cuda-nn's "SphericalHarmonics" of degree 3.
    """
    x, y, z = directions.unbind(-1)
    return torch.stack(
        (
            torch.full_like(x, 0.28209479177387814),  # degree 0: 1 / (2 sqrt(pi))
            -0.48860251190291987 * y,  # degree 1: sqrt(3 / (4 pi))
            0.48860251190291987 * z,
            -0.48860251190291987 * x,
            1.0925484305920792 * x * y,  # degree 2: sqrt(15 / (4 pi))
            -1.0925484305920792 * y * z,
            0.94617469575756008 * z * z - 0.31539156525252005,  # sqrt(5 / (16 pi)) (3 z^2 - 1)
            -1.0925484305920792 * x * z,
            0.54627421529603959 * (x * x - y * y),  # sqrt(15 / (16 pi))
        ),
        -1,
    )
