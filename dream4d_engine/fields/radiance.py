"""The canonical field: density and colour of a point, at no particular time.

Points are handled in two frames: p in the world's box [-radius, radius]^3, u = (p / radius + 1) / 2 in [0, 1]^3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import Kernels
from .encodings import HashGrid, HashGridConfig, require_range
from .mlp import MLP

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
        self.densest: float | None = None  # while set, what densities are bent to stay below; no part of what is saved
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

    def _density(self, u: Tensor, features: Tensor, kernels: Kernels) -> Tensor:
        density = F.softplus(self.density_mlp(features, kernels).float()[:, 0] + self.blob(u))
        if self.densest is None:
            return density
        return -self.densest * torch.expm1(-density / self.densest)  # the same where it is low

    def density(self, u: Tensor, kernels: Kernels) -> Tensor:
        """[S, 3] in [0, 1] -> [S]."""
        return self._density(u, self.grid(u, kernels), kernels)

    def forward(self, u: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """[S, 3] in [0, 1] -> density [S], rgb [S, 3] in (0, 1)."""
        features = self.grid(u, kernels)
        return self._density(u, features, kernels), torch.sigmoid(self.color_mlp(features, kernels).float())
