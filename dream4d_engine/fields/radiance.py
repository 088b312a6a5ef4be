"""The canonical field: density and colour of a point, at no particular time.

Points are handled in two frames: p in the world's box [-radius, radius]^3, u = (p / radius + 1) / 2 in [0, 1]^3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import Kernels
from .encodings import HashGrid, HashGridConfig, require_range
from .mlp import MLP, ask_together

Blob = Literal["magic3d", "dreamfusion"]
_BLOBS: tuple[Blob, ...] = ("magic3d", "dreamfusion")


def blob_named(name: str) -> Blob:
    """The blob of this name; refuse any other."""
    for blob in _BLOBS:
        if blob == name:
            return blob
    raise ValueError(f"blob must be 'magic3d' or 'dreamfusion', got {name!r}")


@dataclass(frozen=True)
class RadianceConfig:
    """A hash grid read by two networks, one for density and one for colour."""

    grid: HashGridConfig = HashGridConfig()
    hidden_width: int = 64
    hidden_layers: int = 1
    blob: Blob = "magic3d"  # shape of the density that a fresh field starts from
    blob_scale: float = 10.0  # its logit in the middle
    blob_std: float = 0.5  # its size, world units

    def __post_init__(self) -> None:
        require_range("hidden_width", self.hidden_width, 1, 1024)
        require_range("hidden_layers", self.hidden_layers, 0, 16)
        require_range("blob_scale", self.blob_scale, -1e4, 1e4)
        require_range("blob_std", self.blob_std, 1e-4, 1e4)
        blob_named(self.blob)


class RadianceField(nn.Module):
    """density = softplus(logit + blob(p)), colour = sigmoid; neither depends on the view."""

    def __init__(self, config: RadianceConfig, radius: float) -> None:
        super().__init__()
        self.config, self.radius = config, radius
        # while set, what densities are bent to stay below, and how they are blurred; no part of what is saved
        self.densest: float | None = None
        self.softened: Tensor | None = None
        self.grid = HashGrid(config.grid, 3)
        n_inputs = self.grid.layout.n_outputs
        self.density_mlp = MLP(n_inputs, 1, config.hidden_width, config.hidden_layers)
        self.color_mlp = MLP(n_inputs, 3, config.hidden_width, config.hidden_layers)

    def reset(self, generator: torch.Generator) -> None:
        """Start afresh."""
        for part in (self.grid, self.density_mlp, self.color_mlp):
            part.reset(generator)

    def blob(self, u: Tensor) -> Tensor:
        """Return the density logit [S] that is added at u [S, 3]."""
        config = self.config
        squared = ((2 * u - 1) * self.radius).square().sum(-1)  # |p|^2
        if config.blob == "magic3d":  # Magic3D, 2211.10440; the guard keeps the gradient finite at the origin
            return config.blob_scale * (1 - squared.clamp_min(1e-12).sqrt() / config.blob_std)
        return config.blob_scale * torch.exp(-squared / (2 * config.blob_std**2))  # DreamFusion, 2209.14988

    @torch.no_grad()
    def soften(self, densest: float | None, softness: float | None, kernels: Kernels) -> None:
        """Take the solid for softer than it is, until told otherwise: a hard one hardly says which way to move.

        Args:
            densest: what densities are bent to stay below; the same where they are low. None: as they are.
            softness: standard deviation of a blur of these, in shares of the box; it needs `densest`. None: none.
        """
        self.densest, self.softened = densest, None
        if densest is None or softness is None:
            return
        ticks = torch.linspace(0, 1, round(1 / softness) + 1, device=self.grid.table.device)
        rows = [self.density(torch.cartesian_prod(x[None], ticks, ticks), kernels) for x in ticks]
        solid = _blurred(torch.stack(rows).view([len(ticks)] * 3) / densest, softness * (len(ticks) - 1))
        # squared, the outline of what is opaque stays where it was
        self.softened = densest * solid.square()

    def _density(self, u: Tensor, logit: Tensor) -> Tensor:
        """The density [S] at u, by what the network says of it, [S, 1]."""
        density = F.softplus(logit.float()[:, 0] + self.blob(u))
        if self.densest is None:
            return density
        return -self.densest * torch.expm1(-density / self.densest)  # the same where it is low

    def density(self, u: Tensor, kernels: Kernels) -> Tensor:
        """[S, 3] in [0, 1] -> [S]."""
        if self.softened is not None:
            return _between(self.softened, u)
        return self._density(u, self.density_mlp(self.grid(u, kernels), kernels))

    def forward(self, u: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """[S, 3] in [0, 1] -> density [S], rgb [S, 3] in (0, 1)."""
        features = self.grid(u, kernels)
        if self.softened is not None:
            density, color = _between(self.softened, u), self.color_mlp(features, kernels)
        else:
            logit, color = ask_together(features, (self.density_mlp, self.color_mlp), kernels)
            density = self._density(u, logit)
        return density, torch.sigmoid(color.float())


def _blurred(lattice: Tensor, deviation: float) -> Tensor:
    """Blur a lattice [X, Y, Z] by a Gaussian of so many cells; there is nothing beyond it."""
    reach = math.ceil(3 * deviation)
    offsets = torch.arange(-reach, reach + 1, device=lattice.device)
    weights = torch.exp(-offsets.square() / (2 * deviation**2))
    weights = (weights / weights.sum())[None, None]
    for _ in range(3):  # along the last axis, which then becomes the first
        lines = F.conv1d(lattice.reshape(-1, 1, lattice.shape[-1]), weights, padding=reach)
        lattice = lines.view_as(lattice).movedim(-1, 0)
    return lattice


def _between(lattice: Tensor, u: Tensor) -> Tensor:
    """Interpolate a lattice [N, N, N] of points over the unit cube at u [S, 3], linearly along each axis: [S]."""
    n = len(lattice)
    at = u.clamp(0, 1) * (n - 1)
    low = at.detach().floor().clamp_max(n - 2)
    share, (i, j, k) = at - low, low.long().unbind(-1)
    step = torch.arange(2, device=u.device)
    corners = step[:, None, None] * n * n + step[:, None] * n + step  # [2, 2, 2], from a cell's first point on
    values = lattice.flatten()[((i * n + j) * n + k)[:, None, None, None] + corners]
    for axis in range(3):
        values = torch.lerp(values[:, 0], values[:, 1], share[:, axis].view(-1, *[1] * (2 - axis)))
    return values
