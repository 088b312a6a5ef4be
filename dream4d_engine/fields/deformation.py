"""The deformation field: where in the canonical field a point of the moving scene is looked up.

It is a *backward* warp (observed -> canonical), one function for all times, and starts as no displacement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import Kernels
from .body import BodyMotion
from .encodings import HashGrid, HashGridConfig, require_range
from .mlp import MLP


@dataclass(frozen=True)
class DeformationConfig:
    """A hash grid over (u, t) read by one network."""

    grid: HashGridConfig = HashGridConfig(n_levels=12, base_resolution=4)
    hidden_width: int = 64
    hidden_layers: int = 4
    scale: float = 1.0  # above 1 it enlarges the canonical object in the frame
    body_knots: int = 0  # of the motion as a whole that the local one is added to, over time; 0: there is none

    def __post_init__(self) -> None:
        require_range("hidden_width", self.hidden_width, 1, 1024)
        require_range("hidden_layers", self.hidden_layers, 0, 16)
        require_range("scale", self.scale, 0.05, 20.0)
        if self.body_knots and not 4 <= self.body_knots <= 1024:
            raise ValueError(f"body_knots must be 0, or lie in [4, 1024], got {self.body_knots}")


class DeformationField(nn.Module):
    """Displacements in units of the [0, 1] box. `active_levels` grows during training (coarse to fine)."""

    active_levels: Tensor

    def __init__(self, config: DeformationConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = HashGrid(config.grid, 4)
        self.mlp = MLP(self.grid.layout.n_outputs, 3, config.hidden_width, config.hidden_layers)
        self.body = BodyMotion(config.body_knots) if config.body_knots else None
        self.register_buffer("active_levels", torch.tensor(config.grid.n_levels, dtype=torch.int64))
        self.shown = 1.0  # share of the motion that is shown: while it is trained, the prior may be shown less, or more
        self._n_active = config.grid.n_levels  # the same on the host: asking a GPU for it would stop every query

    def reset(self, generator: torch.Generator) -> None:
        """Start afresh, with zero displacement: the last layer's weights are zero."""
        self.grid.reset(generator)
        self.mlp.reset(generator)
        with torch.no_grad():
            self.mlp.layers[-1].zero_()
        if self.body is not None:
            self.body.reset()

    def set_active_levels(self, n_levels: int) -> None:
        """Use the coarsest `n_levels` levels of the grid only."""
        self._n_active = max(0, min(n_levels, self.config.grid.n_levels))
        self.active_levels.fill_(self._n_active)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.active_levels.device.type != "meta":  # where only shapes are looked at there is no number
            self._n_active = int(self.active_levels)

    def displacement(self, u: Tensor, times: Tensor, kernels: Kernels) -> Tensor:
        """u [S, 3], times [S], all in [0, 1] -> displacements [S, 3]; the local part lies in (-1, 1)."""
        if self.body is None:
            return self._local(u, times, kernels)
        came_from = self.body(u, times, self.shown)
        if not self._n_active:
            return came_from - u
        # in the object's own frame, so that what is local goes along
        return came_from - u + self._local(came_from.clamp(0, 1), times, kernels)

    def _local(self, u: Tensor, times: Tensor, kernels: Kernels) -> Tensor:
        features = self.grid(torch.cat((u, times[:, None]), -1), kernels, self._n_active)
        displacement = 2 * torch.sigmoid(self.mlp(features, kernels).float()) - 1
        return displacement if self.shown == 1 else self.shown * displacement

    def warp(self, u: Tensor, displacement: Tensor) -> Tensor:
        """Return the places [S, 3] in [0, 1] where the canonical field is queried."""
        # zoomed about the box's middle: places further apart in the frame show ones that lie closer in the field
        return ((u + displacement - 0.5) / self.config.scale + 0.5).clamp(0, 1)
