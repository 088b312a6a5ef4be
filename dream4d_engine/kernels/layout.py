"""Where the entries of a multiresolution hash grid lie: tiny-cuda-nn's layout, in any dimension.

Level l has scale s_l = base * growth^l - 1 and resolution ceil(s_l) + 1. A point u in [0, 1]^D has position
u * s_l + 0.5 in it. A level whose resolution^D entries fit into 2^log2_entries is dense (the first coordinate runs
fastest); otherwise it is hashed (Mueller et al. 2022, arXiv 2201.05989, equation 4). All levels share one flat
vector, level after level, the features of an entry beside each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

PRIMES = (1, 2654435761, 805459861, 3674653429)
"""The factor of each coordinate in the hash."""


PUBLISHED_GROWTH = 1.447269237440378
_ROUNDED_UP = frozenset({1, 2, 6, 9, 10, 11, 13, 15})
"""Levels of the published growth where a GPU's exp2 is one unit in the last place above the nearest number."""


@dataclass(frozen=True)
class GridLevel:
    """One level of a grid."""

    scale: float  # a position in it is u * scale + 0.5
    resolution: int  # corners a side
    size: int  # entries (not numbers)
    offset: int  # of its first entry
    hashed: bool  # else dense


@dataclass(frozen=True)
class GridLayout:
    """All levels of a grid, and what they follow from."""

    n_dims: int  # coordinates of a point
    n_features: int  # numbers an entry
    levels: tuple[GridLevel, ...]  # the coarsest first
    log2_entries: int  # of a level at most
    base_resolution: int
    growth: float  # of the resolution from level to level

    def __hash__(self) -> int:
        """Cheap, since what is made of a layout is looked up at every call."""
        return hash((self.n_dims, self.n_features, len(self.levels), self.log2_entries, self.growth))

    @property
    def n_parameters(self) -> int:
        """Length of the flat vector."""
        return (self.levels[-1].offset + self.levels[-1].size) * self.n_features

    @property
    def n_outputs(self) -> int:
        """Numbers a point is encoded to."""
        return len(self.levels) * self.n_features


def _level_scale(level: int, base_resolution: int, growth: float) -> float:
    """Return base * growth^level - 1 as a GPU computes it in fp32: fma(exp2(level * log2(growth)), base, -1)."""
    # At resolution 4096 one unit in the last place of exp2 shows in the fourth digit of the encoding. The GPU's fast
    # exp2 is not always the nearest number; for the published growth its results are known (with them, encodings agree
    # with tiny-cuda-nn's to 2e-7 at all levels), for others the nearest is taken.
    exponent = np.float32(level) * np.float32(math.log2(np.float32(growth)))
    power = np.float32(2.0 ** float(exponent))
    if growth == PUBLISHED_GROWTH and level in _ROUNDED_UP:
        power = np.nextafter(power, np.float32(np.inf))
    return float(np.float32(float(power) * base_resolution - 1.0))


def grid_layout(
    n_dims: int, n_levels: int, n_features: int, log2_entries: int, base_resolution: int, growth: float
) -> GridLayout:
    """Lay out a grid."""
    if not 1 <= n_dims <= len(PRIMES):
        raise ValueError(f"a hash grid has 1 to {len(PRIMES)} dimensions, got {n_dims}")
    levels, offset = [], 0
    for level in range(n_levels):
        scale = _level_scale(level, base_resolution, growth)
        resolution = math.ceil(scale) + 1
        dense = resolution**n_dims
        size = min(-(-dense // 8) * 8, 2**log2_entries)  # rounded up to 8, as tiny-cuda-nn does
        levels.append(GridLevel(scale, resolution, size, offset, hashed=dense > size))
        offset += size
    return GridLayout(n_dims, n_features, tuple(levels), log2_entries, base_resolution, growth)
